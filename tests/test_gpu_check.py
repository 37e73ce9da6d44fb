"""The GPU check's own logic and rows, on a machine without a GPU: what could go wrong with one, found before."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_rows
from robustft.ops import dispatch


def values(run) -> list[torch.Tensor]:
    result = run()
    return [r.detach().double() for r in (result if isinstance(result, (list, tuple)) else [result])]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpu_rows.contrastive(40, 16, torch.float32),
        lambda: gpu_rows.distillation(40, 16, torch.float32),
        lambda: gpu_rows.sigmoid(40, 16, torch.float32),
        lambda: gpu_rows.classes(40, 9, 16),
        lambda: gpu_rows.neighbors(40, 300, 16, 5),
        lambda: gpu_rows.scores(40, 9, 16),
        lambda: gpu_rows.dual_risk(40, 9, 16),
        lambda: gpu_rows.misalignment(40, 9),
    ],
    ids=["contrastive", "distillation", "sigmoid", "classes", "neighbors", "scores", "dual_risk", "misalignment"],
)
def test_candidates_of_a_row_compute_the_same(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    candidates = make()
    assert len(candidates) >= 2
    ours = values(candidates.pop("robustft"))
    for name, run in candidates.items():
        for a, b in zip(ours, values(run), strict=False):
            if "inexact" in name:  # scores, not distances: as many of them
                assert a.shape == b.shape
            else:
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_siglip_kernel_is_asked_for_the_same_loss(monkeypatch):
    def fused_siglip_loss(x, t, log_temperature, bias):  # what its README says that it computes
        z = x @ t.T * log_temperature.exp() + bias
        return -torch.nn.functional.logsigmoid((2 * torch.eye(len(x)) - 1) * z).sum() / len(x)

    monkeypatch.setitem(sys.modules, "siglip_kernel", SimpleNamespace(fused_siglip_loss=fused_siglip_loss))
    candidates = gpu_rows.sigmoid(40, 16, torch.float32, peers=False)
    ours, theirs = values(candidates["robustft"]), values(candidates["siglip-kernel"])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_kernel_runs_once_on_a_small_case(capsys):
    gpu_rows.small()
    assert capsys.readouterr().out == "done\n"


@pytest.mark.parametrize(
    ("bar", "times", "said"),
    [
        (gpu_rows.Bar(6.5, 4.0), {"robustft": 5.0, "eager": 21.0}, "6.5 ms met; 4x eager met"),
        (gpu_rows.Bar(6.5), {"robustft": 13.0}, "6.5 ms not met, 2.00 times that"),
        (
            gpu_rows.Bar(None, 4.0, 2.0),
            {"robustft": 2.0, "eager": 6.0, "Liger": 4.0},
            "4x eager not met, 3.00x; 2x Liger met",
        ),
        (gpu_rows.Bar(None, None, 2.0), {"robustft": 2.0, "Liger": "OutOfMemoryError: "}, ""),
        (gpu_rows.Bar(), {"robustft": 3.0, "FLYP step": 2.0}, "1.45 of a FLYP step not met, 1.50"),
    ],
)
def test_verdict_says_what_is_met(bar, times, said):
    assert gpu_rows.verdict(bar, times) == said


def test_the_roofline_is_the_slowest_of_products_and_copies():
    rates = {"bf16_tflops": 800.0, "fp32_tflops": 50.0, "copy_tb_per_second": 2.5}
    least = {name: work.milliseconds(rates) for name, (_, _, work) in gpu_rows.ROWS.items()}
    assert min(least.values()) > 0
    assert least["contrastive-bf16-32768"] == pytest.approx(6 * 32768**2 * 512 / 800e9)  # 4.1 ms
    assert least["contrastive-fp32-8192"] == pytest.approx(6 * 8192**2 * 512 / 50e9)
    assert least["misalignment-fp32-4096"] == pytest.approx(3 * 4 * 4096 * 1000 / 2.5e9)
    assert 90 < least["carot-step-512"] < 120


@pytest.mark.exhaustive
def test_a_step_that_hangs_costs_only_itself(tmp_path):
    check = gpu_check.Check(tmp_path / "gpu.json", minutes=5)
    run = check.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 6)
    assert run["status"] == "cut off" and run["output"] == "begun\n" and run["seconds"] < 30
    check.keep("build", run)
    check.keep("rows", {"carot-step-512": {"status": 1}})
    held = json.loads((tmp_path / "gpu.json").read_text())
    assert held["build"]["status"] == "cut off"
    assert "| carot-step-512 | 1.45 of a FLYP step |  | not measured (1) |" in gpu_check.table(held)


def collected(suites: list[str], python) -> list[str]:
    """The names of the suites' tests as on a machine with a GPU."""
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", *suites]
    code = f"import pytest, torch; torch.cuda.is_available = lambda: True; pytest.main({options})"
    environment = os.environ | {"PYTHONPATH": f"{gpu_check.ROOT}:{gpu_check.ROOT / 'tests'}"}
    run = python.run("-c", code, environment=environment, folder=gpu_check.ROOT)
    return [line for line in run.stdout.splitlines() if "::" in line]


@pytest.mark.exhaustive
def test_every_gpu_test_is_in_one_part(python):
    from _pytest.mark.expression import Expression

    parts = gpu_check.parts()
    suites = list(dict.fromkeys(suite for part in parts for suite in part.suites))
    chosen = dict.fromkeys((name for name in collected(suites, python) if "cuda" in name), 0)
    for part in parts:
        selects = Expression.compile(part.selects)
        mine = [
            name
            for name in chosen
            if name.split("::")[0] in part.suites and selects.evaluate(lambda word, name=name, **_: word in name)
        ]
        assert mine, part.name
        for name in mine:
            chosen[name] += 1
    assert set(chosen.values()) == {1}
    for path in (gpu_check.ROOT / "tests").rglob("test_*.py"):
        shared = re.search(r"^@each_|^@.*TARGETS|^def test\w*\(.*\bdevice\b", path.read_text(), re.MULTILINE)
        assert not shared or path.relative_to(gpu_check.ROOT).as_posix() in suites, path


SAID = """\
tests/test_scores.py::test_a[triton-cuda-float32-1-2] PASSED [ 20%]
tests/test_scores.py::test_b[triton-cuda-float32] FAILED [ 40%]
tests/test_scores.py::test_c[a b] PASSED [ 60%]
tests/test_scores.py::test_d[1] """


def test_a_part_that_is_cut_off_says_how_far_it_came():
    run = gpu_check.outcome({"seconds": 9.0, "status": "cut off", "output": SAID})
    assert run["counts"] == {"passed": 2, "failed": 1} and run["tail"][-1].startswith("tests/test_scores.py::test_d[1]")
    end = SAID + "PASSED\nFAILED tests/test_scores.py::test_b[x] - assert\n1 failed, 3 passed in 9.00s\n"
    run = gpu_check.outcome({"seconds": 9.0, "status": 1, "output": end})
    assert run["counts"] == {"passed": 3, "failed": 1} and run["summary"] == "1 failed, 3 passed in 9.00s"
    assert run["failures"] == ["FAILED tests/test_scores.py::test_b[x] - assert"]


@pytest.mark.parametrize("ends", [[0, 0], [0, 5]])
def test_parts_run_at_once_and_are_kept_as_they_end(ends, tmp_path, monkeypatch):
    parts = [gpu_check.Part(name, (f"{name}.py",), "cuda") for name in ("first", "second")]
    monkeypatch.setattr(gpu_check, "parts", lambda: parts)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    together, kept = threading.Barrier(2, timeout=30), []

    class Check(gpu_check.Check):
        def run(self, command, limit, **environment):
            together.wait()  # neither ends before the other has begun
            first = command[-1] == "first.py"
            assert command[-3:-1] == ["-k", "cuda"] and 0 < limit <= 240
            return {"seconds": 1.0, "status": ends[0 if first else 1], "output": "tests/a.py::b PASSED\n1 passed\n"}

        def keep(self, step, result, news=None):
            kept.append(json.loads(json.dumps(result)))
            super().keep(step, result, news)

    gpu_check.tests(Check(tmp_path / "gpu.json", minutes=5))
    assert [len(result["parts"]) for result in kept] == [1, 2]
    assert kept[0]["status"] != 0 and kept[1]["status"] == (["second"] if ends[1] else 0)
    assert json.loads((tmp_path / "gpu.json").read_text())["tests"] == kept[1]


def test_nothing_is_begun_when_no_time_is_left():
    check = gpu_check.Check(None, minutes=0)
    assert check.run([sys.executable, "-c", "print(1)"], 60)["status"] == "no time left"


def test_the_page_is_of_the_results():
    text = (gpu_check.ROOT / "benchmarks" / "results" / "gpu.md").read_text()
    assert text == gpu_check.page() + "\n", "python -m benchmarks.gpu_check --list > benchmarks/results/gpu.md"
    assert all(f"| {name} |" in text for name in gpu_rows.ROWS) and "6.5 ms, 4x eager, 2x every peer" in text


SAID_BY_A_ROW = """\
a library's warning
{"first": "robustft", "seconds": 0.5, "extra_mb": 12.5}
{"checked": "robustft"}
{"error": "Liger", "what": "OutOfMemoryError: "}
{"round": {"robustft": 2.0, "eager": 9.0}}
{"round": {"robustft": 3.0, "eager": 9.0}}
{"round": {"robustft": 2.5, "eager": 8.0}}
{"round": {"robus"""


def test_a_row_that_is_cut_off_is_made_of_its_whole_rounds():
    name, rates = "contrastive-bf16-32768", {"bf16_tflops": 800.0, "fp32_tflops": 50.0, "copy_tb_per_second": 4.0}
    row = gpu_rows.record(name, SAID_BY_A_ROW, rates)
    assert row["milliseconds"] == {"robustft": 2.5, "eager": 9.0, "Liger": "OutOfMemoryError: "} and row["rounds"] == 3
    assert (
        row["checked"] and row["first"] == {"robustft": 12.5} and row["share"] == pytest.approx(4.123 / 2.5, rel=1e-3)
    )
    assert "milliseconds" not in gpu_rows.record(name, SAID_BY_A_ROW.split("{", 1)[0], rates)


@pytest.mark.parametrize("wrong", [lambda a: 1.1 * a, lambda a: a * torch.nan])
def test_a_wrong_result_is_an_error_and_not_a_time(wrong, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for candidates in (gpu_rows.contrastive(40, 16, torch.float32), gpu_rows.neighbors(40, 300, 16, 5)):
        result = candidates["robustft"]()
        assert candidates.check is not None
        candidates.check(result)
        result = wrong(result) if isinstance(result, torch.Tensor) else [result[0], wrong(result[1]), *result[2:]]
        with pytest.raises(AssertionError, match="relative error"):
            candidates.check(result)


@pytest.mark.parametrize("factor", [1.0, 1.1, float("nan")])
def test_a_function_whose_values_are_wrong_is_said_to_be(factor, monkeypatch, capsys):
    right = gpu_rows.rf.cvar

    def wrong(*arguments, **options):
        return right(*arguments, **options) * (1.0 if dispatch.chosen() == "reference" else factor)

    monkeypatch.setattr(gpu_rows.rf, "cvar", wrong)
    gpu_rows.values("cvar")
    said = [json.loads(line)["right"] for line in capsys.readouterr().out.splitlines()]
    assert said == 3 * [factor == 1.0]


def test_every_job_of_a_step_ends_and_says_how(capfd):
    check = gpu_check.Check(None, minutes=1)
    check.forks = True
    functions, unknown = check.rows([["functions"], ["no-such-row"]], 60)
    assert functions["status"] == 0 and "contrastive_loss" in functions["output"].split()
    assert unknown["status"] == 1 and "no-such-row" in unknown["output"]
    job = gpu_check.forked(lambda: print("begun", flush=True) or threading.Event().wait(60), 1)
    assert job.result()["status"] == "cut off" and "begun" not in capfd.readouterr().out


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.exhaustive
@without_gpu
def test_without_a_gpu_nothing_is_claimed(python):
    run = python.run("-m", "benchmarks.gpu_check", folder=gpu_check.ROOT)
    assert run.returncode == 2 and "no GPU that torch can use" in run.stdout


@pytest.mark.exhaustive
@without_gpu
def test_a_rehearsal_without_a_gpu_says_so_at_every_step(python, tmp_path):
    # Not those of processes that import torch: 22 of tests, three that tune, and one before a build.
    steps = [step for step in gpu_check.STEPS if step not in ("tests", "build", "tune")]
    options = ["--rehearse", "--output", str(tmp_path), "--only", *steps]
    before = {path: path.read_bytes() for path in gpu_check.RESULTS.iterdir()}
    run = python.run("-m", "benchmarks.gpu_check", *options, folder=gpu_check.ROOT)
    assert run.returncode == 2, run.stdout + run.stderr
    assert "no row was measured" in run.stdout and "\nncu" in run.stdout
    held = json.loads((tmp_path / "rehearsal.json").read_text())
    assert held["command"] == "python -m benchmarks.gpu_check --rehearse" and set(steps) < set(held)
    assert {run["status"] for run in held["values"].values()} == {held["rates"]["status"]} == {"no device"}
    assert {run["status"] for run in held["rows"].values()} == {"no device"} and set(held["rows"]) == set(gpu_rows.ROWS)
    assert set(held["compiled"]["failed"]) <= set(gpu_rows.ROWS)
    for step in ("sanitizer", "profile", "host"):
        said = held[step]
        assert "not measured" in said if isinstance(said, str) else "no device" in json.dumps(said)
    assert before == {path: path.read_bytes() for path in gpu_check.RESULTS.iterdir()}


def test_it_ends_with_the_rows_that_are_farthest_behind_the_model(monkeypatch):
    names = list(gpu_rows.ROWS)[:5]
    monkeypatch.setattr(gpu_check, "predictions", lambda card: dict.fromkeys(names, 2.0))
    times = [4.0, 2.0, 20.0, 6.0]
    rows = {name: {"milliseconds": {"robustft": t, "eager": 9.0}} for name, t in zip(names, times, strict=False)}
    results = {"rows": rows | {names[4]: {"status": "cut off"}, "unknown": {"milliseconds": {"robustft": 9.0}}}}
    assert [gap.row for gap in gpu_check.gaps(results)] == [names[2], names[3], names[0]]
    assert f"{names[2]}: 20.000 ms, predicted 2.000, 10.00 times that" in gpu_check.closing(results)
    assert gpu_check.closing(results | {"profile": "not measured: no ncu"}).endswith("\nncu: not measured: no ncu")
    said = {"row": names[2], "status": 0, "said": ["  Duration 3 ms"]}
    assert gpu_check.closing(results | {"profile": said}).endswith(
        f"ncu of {names[2]}, which ended with 0:\n  Duration 3 ms"
    )


def test_ncu_looks_at_the_row_that_is_farthest_behind(monkeypatch):
    asked = []

    class Check(gpu_check.Check):
        def run(self, command, limit, **environment):
            asked.append(command[-1])
            return {"seconds": 1.0, "status": 0, "output": "  Duration 3 ms\n"}

    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_check, "predictions", lambda card: {"classes-bf16-512": 1.0})
    for rows in ({}, {"classes-bf16-512": {"milliseconds": {"robustft": 2.0}}}):
        check = Check(None, minutes=1)
        check.results["rows"] = rows
        gpu_check.profile(check)
        assert check.results["profile"] == {"row": asked[-1], "status": 0, "seconds": 1.0, "said": ["  Duration 3 ms"]}
    assert asked == [gpu_check.PROFILED, "classes-bf16-512"]


def test_what_was_tuned_before_the_limit_is_kept():
    class Check(gpu_check.Check):
        def run(self, command, limit, **environment):
            assert environment == {"ROBUSTFT_AUTOTUNE": "1"} and command[-1] in gpu_rows.ROWS
            if command[-1] == gpu_check.TUNED[-1]:
                return {"seconds": 0.0, "status": "no time left", "output": ""}
            return {"seconds": 90.0, "status": "cut off", "output": f"a warning\n{line}\nHALF_BLO"}

    line = "HALF_TILES[('sm_90', 1, True)] = Tile(64, 64, 64, 4, 3)  # 0.020 ms, before 0.021"
    check = Check(None, minutes=1)
    gpu_check.tune(check)
    *cut, last = (check.results["tune"][name] for name in gpu_check.TUNED)
    assert cut and all(run == {"seconds": 90.0, "status": "cut off", "found": [line]} for run in cut)
    assert last == {"seconds": 0.0, "status": "no time left", "found": [], "output": ""}
