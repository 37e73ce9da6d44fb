"""The GPU check's own logic and rows, on a machine without a GPU: what could go wrong with one, found before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_rows


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
        lambda: gpu_rows.classes(40, 9, 16),
        lambda: gpu_rows.neighbors(40, 300, 16, 5),
        lambda: gpu_rows.scores(40, 9, 16),
        lambda: gpu_rows.dual_risk(40, 9, 16),
        lambda: gpu_rows.misalignment(40, 9),
    ],
    ids=["contrastive", "distillation", "classes", "neighbors", "scores", "dual_risk", "misalignment"],
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


def test_a_step_that_hangs_costs_only_itself(tmp_path):
    check = gpu_check.Check(tmp_path / "gpu.json", minutes=5)
    run = check.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 6)
    assert run["status"] == "cut off" and run["output"] == "begun\n" and run["seconds"] < 30
    check.keep("build", run)
    check.keep("rows", {"a-row": {"status": 1}})
    held = json.loads((tmp_path / "gpu.json").read_text())
    assert held["build"]["status"] == "cut off" and "| a-row | not measured | 1 |" in gpu_check.table(held)


def test_nothing_is_begun_when_no_time_is_left():
    check = gpu_check.Check(None, minutes=0)
    assert check.run([sys.executable, "-c", "print(1)"], 60)["status"] == "no time left"


def test_the_list_of_what_no_gpu_has_measured_is_of_these_rows():
    text = (gpu_check.ROOT / "benchmarks" / "results" / "gpu.md").read_text()
    assert text == gpu_check.unmeasured() + "\n", "python -m benchmarks.gpu_check --list > benchmarks/results/gpu.md"
    assert all(f"| {name} |" in text for name in gpu_rows.ROWS) and "6.5 ms, 4x eager, 2x every peer" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed():
    root = Path(gpu_check.__file__).parent.parent
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 2 and "no GPU that torch can use" in run.stdout
