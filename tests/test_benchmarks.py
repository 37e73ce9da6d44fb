"""The benchmark suite: the bar is the design's, candidates compute one thing and take turns, results survive a kill."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from targets import exhaustive

from benchmarks import bar, machine, memory, show, step, store, timing
from benchmarks.__main__ import works
from benchmarks.work import Candidate, Row, forward

WORKS = {work.name: work for work in works().values()}
CRITERION = bar.Criterion(Row("contrastive", 8192), "speed", 2.0, 3.0, "open_clip")


def record(seconds: dict[str, list[float]], row: Row = CRITERION.row, **ours) -> dict:
    candidates = {name: {"seconds": s, "error": 1e-7, "extra_bytes": 5_000_000} for name, s in seconds.items()}
    candidates["robustft"] |= ours
    return {
        "name": str(row),
        "row": vars(row),
        "threads": 2,
        "formula": "6 N^2 D",
        "flops": 6e9,
        "gemm": {"float32": 6e9, "bfloat16": 36e9},
        "candidates": candidates,
    }


def judged(criterion: bar.Criterion, *records: dict) -> bar.Verdict:
    return bar.judge(criterion, {r["name"]: r for r in records})


# The bar


def test_the_bar_is_the_one_of_the_design():
    demands = [f"{c.row}: {show.demand(c)}, {c.moonshot}" for c in bar.BAR]
    assert demands == [
        "contrastive N=8192 D=512 float32 highest: 2.2x open_clip, 3.0",
        "contrastive N=8192 D=512 float32 high: 4x open_clip, 7.0",
        "contrastive N=8192 D=512 bfloat16: 3x open_clip, 6.0",
        "distillation N=4096 D=512 float32 high: 4x eager, 8.0",
        "contrastive N=8192 D=512 float32 highest: robustft panel, 64.5 MB beyond inputs and gradients, None",
        "distillation N=4096 D=512 float32 high: robustft panel, 64.3 MB beyond inputs and gradients, None",
        "sigmoid N=8192 D=768 float32 highest: 1.8x open_clip, None",
        "sigmoid N=8192 D=768 float32 highest: robustft panel, 64.5 MB beyond inputs and gradients, None",
        "classification N=4096 K=1000 D=512 float32 highest: 2x eager, 3.0",
        "classification N=4096 K=1000 D=512 float32 highest: 1.3x torch.compile, None",
        "classification N=4096 K=1000 D=512 float32 high: 3x eager, 6.0",
        "dual_risk N=4096 K=1000 D=512 float32 highest: 2x eager, 4.0",
        "dual_risk N=4096 K=1000 D=512 float32 high: 2x eager, 4.0",
        "scores N=65536 K=1000 D=512 float32 highest: 1.5x eager, 2.0",
        "scores N=65536 K=1000 D=512 bfloat16: 4x eager, 8.0",
        "kth_neighbor N=8192 K=100000 D=512 float32 highest: 6x faiss, 12.0",
        "kth_neighbor N=8192 K=100000 D=512 float32 highest: robustft with packing, 4x faiss, 8.0",
        "kth_neighbor N=8192 K=100000 D=512 float32 highest: relative error, None",
        "kth_neighbor N=1 K=100000 D=512 float32 highest: 1x faiss, 2.0",
        "nearest_neighbors N=256 K=20000 D=512 float32 highest: 0.667x kth_neighbor_distance, None",
        "near_duplicates N=2048 K=20000 D=512 float32 highest: relative error, None",
        "contrastive N=512 D=512 float32 highest: 1x eager, 1.5",
        "distillation N=512 D=512 float32 highest: 1x eager, 1.5",
        "classification N=512 K=1000 D=512 float32 highest: 1x eager, 1.5",
        "dual_risk N=512 K=1000 D=512 float32 highest: 1x eager, 1.5",
    ]
    assert [c.must for c in bar.BAR if c.measure == "error"] == [1e-6, 1e-6]


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_of_the_bar_is_measured_with_its_peer(quick):
    for criterion in bar.bar(quick):
        work = WORKS[criterion.row.work]
        assert criterion.row in (work.quick if quick else work.rows)
        names = {c.name for c in work.candidates(criterion.row)}
        # --quick compiles for one row only.
        assert {criterion.ours, criterion.peer} - {""} <= names, criterion


def test_no_row_is_listed_twice():
    for work in WORKS.values():
        for rows in (work.rows, work.quick):
            assert len(rows) == len(set(map(str, rows)))


def test_speed_is_the_median_of_the_rounds_own_ratios():
    # The second round met a busy machine: it slowed both, and says as much as the others.
    ratios = {"robustft": [1.0, 9.0, 1.0], "open_clip": [2.0, 27.0, 4.0]}
    assert bar.speedup(record(ratios)["candidates"], "robustft", "open_clip") == (3.0, 2.5, 3.5)


def test_a_verdict_says_by_how_much_not():
    slow = judged(CRITERION, record({"robustft": [1.0] * 3, "open_clip": [1.5] * 3}))
    assert slow.status == "not met" and slow.text == "1.50x open_clip (1.50 to 1.50): 75 % of 2x"
    fast = judged(CRITERION, record({"robustft": [1.0] * 3, "open_clip": [2.4] * 3}))
    assert fast.status == "met" and fast.text.endswith("moonshot 3x at 80 %")
    assert judged(CRITERION, record({"robustft": [1.0] * 3, "open_clip": [3.0] * 3})).text.endswith("moonshot 3x met")


def test_a_row_without_a_peer_or_without_us_is_not_available():
    alone = record({"robustft": [1.0]})
    alone["candidates"]["open_clip"] = {"missing": "takes 99 s"}
    assert judged(CRITERION, alone)[1:] == ("not available", None, "open_clip: takes 99 s")
    absent = alone | {"candidates": {"robustft": {"missing": "no such function"}}}
    assert judged(CRITERION, absent)[1:] == ("not available", None, "robustft: no such function")
    assert judged(CRITERION).text == "not measured in this run"


def test_memory_and_error_are_judged_by_what_is_too_much():
    memory_of = CRITERION._replace(measure="memory", must=1e6, peer="")
    assert judged(memory_of, record({"robustft": [1.0]}, extra_bytes=999_999)).status == "met"
    assert judged(memory_of, record({"robustft": [1.0]}, extra_bytes=3_000_000)).text.endswith("3.0 times too much")
    error = CRITERION._replace(measure="error", must=1e-6, peer="")
    assert judged(error, record({"robustft": [1.0]}, error=1e-6)).status == "met"
    assert judged(error, record({"robustft": [1.0]}, error=math.nan)).status == "not met"


def test_memory_that_could_not_be_measured_is_not_available():
    failed = record({"robustft": [1.0]}, failed="killed")
    del failed["candidates"]["robustft"]["extra_bytes"]
    verdict = judged(CRITERION._replace(measure="memory", must=1e6, peer=""), failed)
    assert (verdict.status, verdict.text) == ("not available", "robustft: killed")


def test_a_row_slower_than_eager_is_named():
    other = replace(CRITERION.row, n=512)
    records = [record({"robustft": [1.0], "eager": [0.9]}), record({"robustft": [1.0], "eager": [1.1]}, other)]
    text = show.verdicts({"amx": False}, records, quick=False)
    assert f"not met       {CRITERION.row}: 0.90x eager" in text and "1 of 2 rows met" in text


# What is measured


EACH = sorted({(work.name, row.dtype) for work in WORKS.values() for row in work.rows})
STEPS = [case for case in EACH if case[0].endswith("_step")]  # of whole trainings, which take seconds


@pytest.mark.parametrize("name, dtype", [*(case for case in EACH if case not in STEPS), *exhaustive(*STEPS)])
def test_every_candidate_computes_the_reference(name, dtype):
    work = WORKS[name]
    row = replace(work.quick[0], n=70, dtype=dtype, precision="highest")
    row = replace(row, k=min(row.k, 2000))
    expected = work.reference(*work.inputs(row))
    present = [c for c in work.candidates(row) if not c.missing]
    assert present
    for candidate in present:
        timing.check(work, candidate, row, expected)


def test_inputs_are_the_same_every_time_and_have_gradients_where_wanted():
    row = Row("classification", 20, 8, 5)
    first, second = WORKS["classification"].inputs(row), WORKS["classification"].inputs(row)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [a.requires_grad for a in first] == [True, True, False, True]


class Stopwatch:
    """pytest-benchmark's fixture as far as it is used, without its table; `bench` below uses the real one."""

    def __init__(self):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, iterations, warmup_rounds):
        assert (iterations, warmup_rounds) == (1, 0)
        for _ in range(rounds):
            positional, named = setup()
            self.stats.stats.data.append(timing.timed(target, *positional, **named))


def double(x):
    return 2 * x


def work_of(*candidates: Candidate):
    return replace(
        WORKS["cvar"],
        inputs=lambda row: (torch.ones(3),),
        candidates=lambda row: list(candidates),
        reference=forward(double),
    )


def test_candidates_take_turns():
    log = []

    def logging(name):
        return Candidate(name, lambda x: log.append(name))

    candidates = {name: logging(name) for name in ("robustft", "eager", "open_clip")}
    product = timing.Gemm(lambda: log.append("gemm"), 1.0, 1.0)
    seconds = timing.race({"float32": product}, candidates, (None,), 1.0, timing.Limits(4.0, 1.0), Stopwatch())
    assert log == ["gemm", "eager", "open_clip", "robustft"] * 4
    assert {name: len(s) for name, s in seconds.items()} == dict.fromkeys(("float32", *candidates), 4)


def test_rounds_are_never_fewer_than_three():
    seconds = timing.race({}, {"robustft": Candidate("robustft", double)}, (1,), 99.0, timing.FULL, Stopwatch())
    assert len(seconds["robustft"]) == 3


def test_a_candidate_with_other_values_is_an_error():
    wrong = work_of(Candidate("robustft", forward(double)), Candidate("eager", forward(lambda x: 2.1 * x)))
    with pytest.raises(timing.WrongResult, match=r"eager .* relative error 5.0e-02"):
        timing.measure(wrong, Row("cvar", 3, 0), 1, timing.QUICK, Stopwatch())
    nan = Candidate("robustft", forward(lambda x: x * math.nan))
    with pytest.raises(timing.WrongResult, match="nan"):
        timing.check(work_of(nan), nan, Row("cvar", 3, 0), (torch.ones(3),))


def test_a_peer_that_fails_or_takes_too_long_is_left_out(monkeypatch):
    def broken(x):
        raise OSError("no compiler")

    monkeypatch.setattr(memory, "measure", lambda row, name, threads: {"bytes": 1, "extra_bytes": 1})
    slow = Candidate("slow", broken, gemm="bfloat16")
    huge = Candidate("huge", broken, matrices=1e15)
    some = work_of(Candidate("robustft", forward(double)), Candidate("eager", broken), slow, huge)
    row = Row("cvar", 3, 0)
    rates = {"float32": 1e30, "bfloat16": 1.0}
    monkeypatch.setattr(timing, "gemm", lambda dtype, threads: timing.Gemm(lambda: None, 1.0, rates[dtype]))
    measured = timing.measure(replace(some, flops=lambda row: 1e12), row, 1, timing.QUICK, Stopwatch())["candidates"]
    assert "seconds" in measured["robustft"]
    assert measured["eager"] == {"missing": "OSError: no compiler"}
    assert "or more here" in measured["slow"]["missing"] and "GB" in measured["huge"]["missing"]


def test_our_own_failure_is_an_error():
    def broken(x):
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        timing.measure(work_of(Candidate("robustft", broken)), Row("cvar", 3, 0), 1, timing.QUICK, Stopwatch())


@pytest.mark.exhaustive
def test_memory_counts_what_a_run_holds_and_takes_its_results_off():
    taken = memory.measure(Row("contrastive", 2048), "eager", 1)
    assert taken["bytes"] - taken["extra_bytes"] == 4 * (2 * 2048 * 512 + 2)
    assert 2 * 4 * 2048**2 <= taken["extra_bytes"] <= 12 * 4 * 2048**2


@pytest.mark.exhaustive
def test_memory_of_a_failing_run_is_a_message():
    assert memory.measure(Row("contrastive", 64), "nobody", 1)["failed"].startswith("StopIteration")


# Results


def test_results_are_kept_for_the_same_code_only(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    store.Store(path).add(record({"robustft": [1.0]}))
    again = store.Store(path)
    assert again.has(str(CRITERION.row), 2) and not again.has(str(CRITERION.row), 1)
    assert store.Store(path, fresh=True).records == []
    monkeypatch.setattr(store, "_code", lambda: "other")
    changed = store.Store(path)
    assert changed.records == [] and changed.dropped == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_row_that_could_not_be_measured_is_tried_again(tmp_path):
    results = store.Store(tmp_path / "results.json")
    results.add(record({"robustft": [1.0]}) | {"candidates": {"robustft": {"missing": "takes 99 s"}}})
    assert not results.has(str(CRITERION.row), 2)
    results.add(record({"robustft": [1.0]}))
    assert results.has(str(CRITERION.row), 2) and len(store.Store(results.path).records) == 1


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="holds no benchmark results"):
        store.Store(path)
    assert store.Store(path, fresh=True).records == []


def test_the_report_shows_time_share_and_memory_of_each_candidate(tmp_path):
    rows = [replace(CRITERION.row, n=n) for n in (512, 1024, 8192)]
    records = [record({"robustft": [2.0], "open_clip": [5.0]}, row) for row in rows]
    records[0]["candidates"]["torch.compile"] = {"missing": "OSError: no | compiler"}
    plots = show.plot(records, tmp_path, "here")
    assert plots == {"contrastive": "here-contrastive.png"}
    assert (tmp_path / "here-contrastive.png").read_bytes().startswith(b"\x89PNG")
    description = machine.describe() | {"amx": True, "code": "0123abcd"}
    text = show.markdown(description, json.loads(json.dumps(records)), False, plots)
    assert "![contrastive](here-contrastive.png)" in text
    assert (
        "| N=8192 D=512 float32 highest | 2 | robustft | 2 s (2 s to 2 s) | 1.00x | 5 MB | 3 | 50 % | 1e-07 |" in text
    )
    assert "| open_clip | 5 s (5 s to 5 s) | 2.50x | 5 MB | 1 | 20 % |" in text
    assert "| torch.compile | OSError: no \\| compiler |" in text
    assert "met           contrastive N=8192 D=512 float32 highest, 2.2x open_clip" in text


def test_the_share_is_of_the_fastest_product_that_the_precision_allows():
    shares = {
        ("float32", "highest"): 3 / 6,
        ("float32", "high"): 3 / 12,  # a third of bfloat16's
        ("bfloat16", "highest"): 3 / 36,
    }
    for (dtype, precision), expected in shares.items():
        row = replace(CRITERION.row, dtype=dtype, precision=precision)
        assert show.share(record({"robustft": [2.0]}, row), "robustft") == pytest.approx(expected)


@pytest.fixture
def bench(python):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # inherited, it would turn the benchmarks off
    return lambda *arguments, cwd: python.run(
        "-m", "robustft", "bench", *arguments, folder=cwd, environment=environment
    )


@pytest.mark.exhaustive
def test_a_run_goes_on_where_it_was_killed(tmp_path, bench):
    first = bench("--quick", "--only", "cvar", "--threads", "1", "--output", "out", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    (path,) = (tmp_path / "out").glob("*-quick.json")
    (before,) = json.loads(path.read_text())["records"]
    rounds = {len(candidate["seconds"]) for candidate in before["candidates"].values()}
    assert before["name"] == "cvar N=32768 float32 highest" and len(rounds) == 1 and min(rounds) >= 3
    second = bench("--quick", "--only", "cvar|group_risk", "--threads", "1", "--output", "out", cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 rows, threads: 1; 1 of them are measured already" in second.stdout
    kept, added = json.loads(path.read_text())["records"]
    assert kept == before and added["row"]["work"] == "group_risk"
    assert "Never slower than eager" in second.stdout and path.with_suffix(".md").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_pattern_without_rows_lists_those_that_there_are(tmp_path, bench):
    done = bench("--quick", "--only", "nothing like it", cwd=tmp_path)
    assert done.returncode == 1 and "contrastive N=512 D=512 float32 highest" in done.stderr


@pytest.mark.exhaustive
def test_whole_steps_have_the_losses_of_the_plain_loops():
    for method in ("FLYP", "CaRot", "DRM", "FineTune"):
        found = step.measure(step.Case(method, "bundled", 4, 3), steps=1)
        assert found["losses_differ"] < 1e-4 and found["ratio"] > 0
        assert 0.3 < sum(found["shares"].values()) <= 1.0
    found = step.measure(step.Case("CaRot", "bundled", 4, None), steps=1)
    assert found["losses_differ"] < 1e-4 and found["shares"]["teacher"] > 0


def test_a_step_beside_torchs_adamw_has_its_losses_and_fewer_bytes():
    found = step.measure(step.Case("FLYP", "bundled", 4, 3), steps=1, optimizers=True)
    assert found["losses_differ"] == 0 and found["bytes"]["robustft"] < found["bytes"]["torch"] / 4


def test_a_step_that_learns_something_else_is_an_error(monkeypatch):
    monkeypatch.setattr(step, "CROSS_WEIGHT", 0.0)
    with pytest.raises(AssertionError, match="the losses differ by"):
        step.measure(step.Case("CaRot", "bundled", 4, 3), steps=1)
