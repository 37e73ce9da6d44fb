"""What gpu_model.py predicts: of these kernels, near what an H200 took, and what the table of bodies stands on."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import gpu_model, gpu_rows, triton_resources
from robustft.ops.triton import configs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
HELD = gpu_model.committed()
MIDDLE, FARTHEST = 1.3, 2.7
"""By what factor predictions of kernels are off in the middle, and at most."""


def test_every_row_that_is_ours_is_predicted_on_every_architecture():
    assert HELD["sources"] == triton_resources.sources(), "run python -m benchmarks.gpu_model"
    ours = set(gpu_rows.ROWS) - {"carot-step-512"}  # whose time is that of torch's towers
    for architecture in gpu_model.CARDS:
        assert set(HELD["rows"][architecture]) == ours
        assert all(0 < row["device"] <= row["milliseconds"] for row in HELD["rows"][architecture].values())


def test_the_file_holds_what_the_model_says_now():
    run = gpu_model.of_pairs(8192, 512, torch.bfloat16)
    held = HELD["bodies"]["sm_90"]["bfloat16"]["student"]["8192"]
    with gpu_model.by(True):
        assert round(gpu_model.predict("sm_90", run, gpu_model.Resources()).total, 3) == held[1]


def test_the_body_that_runs_is_the_one_that_the_model_has_faster():
    wanted = {
        (architecture, getattr(torch, dtype)): gpu_model.library_from(cases)
        for architecture, by_dtype in HELD["bodies"].items()
        for dtype, cases in by_dtype.items()
    }
    assert wanted == configs.LIBRARY_FROM


def test_the_library_is_taken_from_where_it_wins_every_case_on():
    def times(*library: float) -> dict[str, list[float]]:
        return {str(n): [1.0, of] for n, of in zip(gpu_model.SIZES, library, strict=True)}

    assert gpu_model.library_from({"a": times(2, 2, 0.5, 0.5, 0.5, 0.5)}) == 4096
    assert gpu_model.library_from({"a": times(2, 0.5, 2, 0.5, 0.5, 0.5)}) == 8192  # not where it wins by chance
    assert gpu_model.library_from({"a": times(*[0.5] * 6), "b": times(2, 2, 2, 2, 0.5, 0.5)}) == 16384
    assert gpu_model.library_from({"a": times(*[2.0] * 6)}) == 2 * gpu_model.SIZES[-1]


def test_predictions_are_near_what_an_h200_took():
    factors = sorted(gpu_model.factor(row) for row in HELD["against measured"])
    assert len(factors) > 20
    assert factors[len(factors) // 2] <= MIDDLE and factors[-1] <= FARTHEST


def test_a_kernel_takes_the_sum_of_what_it_does():
    card = gpu_model.Card("some", 10, 2.0, 100.0, 50.0, 10.0, 1.0, "a test")

    class Launch:
        programs = 20

    def took(**work) -> float:
        return gpu_model.kernel_milliseconds(card, Launch, gpu_model.Work(**work)) - gpu_model.LAUNCH

    assert took(flops=1e11) == pytest.approx(1.0) and took(flops=1e11, arithmetic="ieee") == pytest.approx(10.0)
    assert took(memory=1e9) == pytest.approx(1.0)
    assert took(instructions=80e6) == pytest.approx(1.0)  # four schedulers, ten processors, 2 GHz
    assert took(shuffles=20e6) == took(exponentials=10e6) == pytest.approx(1.0)
    assert took(l2=20e6 * gpu_model.L2) == pytest.approx(1.0)
    assert took(turns=500) == pytest.approx(500 * gpu_model.WAIT)
    assert took(flops=1e11, memory=1e9) == pytest.approx(2.0)
    Launch.programs = 11  # one processor has two
    assert took(flops=1e11) == pytest.approx(20 / 11)
