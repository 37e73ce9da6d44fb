"""How the rate falls, and which runs can be made longer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from targets import exhaustive
from test_fit import Stop, assert_same, before_update, make, run, stop
from test_validation import held_out, same, state

from robustft.methods import FLYP, CaRot, FineTune
from robustft.training.checkpoint import load_checkpoint
from robustft.training.schedule import learning_rate


def rates(schedule, total=100, warmup=0.1):
    return [learning_rate(step, total, 2.0, warmup, schedule) for step in range(total)]


def test_every_schedule_rises_alike_and_falls_as_it_says():
    cosine, linear, constant = (rates(schedule) for schedule in ("cosine", "linear", "constant"))
    assert cosine[:11] == linear[:11] == constant[:11] == pytest.approx([*(0.2 * (i + 1) for i in range(10)), 2.0])
    assert linear[10:] == pytest.approx([2.0 * (90 - i) / 90 for i in range(90)])
    assert constant[10:] == [2.0] * 90


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_fit_trains_at_the_rates_of_its_schedule(schedule):
    records = run(make(FineTune), schedule=schedule, log_every=1, lr=2.0 * 1e-3).records
    assert [record["lr"] for record in records] == pytest.approx([rate / 1000 for rate in rates(schedule, 9)])


def test_an_unknown_schedule_is_told_the_known_ones():
    with pytest.raises(ValueError, match="schedule must be one of cosine, linear, constant, got 'step'"):
        run(make(FineTune), schedule="step")


CONSTANT = {"schedule": "constant", "warmup": 0.0, "log_every": 3, "limit_batches": 3}


def longer(**options):
    return CONSTANT | {"epochs": 3} | options


@pytest.mark.parametrize("kind", [FLYP, *exhaustive(CaRot)])
def test_a_constant_run_made_longer_ends_as_one_that_was_that_long(tmp_path, kind):
    """CaRot, which has a schedule over the run, with the length that it is to have in the end."""
    total = {"total_steps": None} if kind is FLYP else {"total_steps": 9}
    watched = {"validation": held_out(), "metric": "nll"}
    whole, method = make(kind, **total), make(kind, **total)
    with pytest.warns(UserWarning, match="total_steps=9, this run has 3") if kind is CaRot else nullcontext():
        run(make(kind, **total), tmp_path / "run", **longer(epochs=1), **watched)
    history = run(method, tmp_path / "run", resume=True, **longer(), **watched)
    expected = run(whole, tmp_path / "whole", **longer(), **watched)
    assert history.records == expected.records and history.best == expected.best
    assert_same(method, tmp_path / "run", whole, tmp_path / "whole")


def test_an_interrupted_run_is_made_longer_or_shorter_too(tmp_path):
    whole, method = make(FLYP, total_steps=None), make(FLYP, total_steps=None)
    with pytest.raises(Stop):
        run(before_update(make(FLYP, total_steps=None), 4, stop), tmp_path, **longer(epochs=4))
    run(method, tmp_path, resume=True, **longer(epochs=2))
    run(whole, **longer(epochs=2))
    assert same(state(method), state(whole)) and int(method.run_steps) == 6
    with pytest.raises(ValueError, match="its step is 6, this run has 3"):
        run(make(FLYP, total_steps=None), tmp_path, resume=True, **longer(epochs=1))


def test_a_warm_up_of_as_many_steps_goes_with_a_longer_run(tmp_path):
    whole, method = make(FLYP, total_steps=None), make(FLYP, total_steps=None)
    run(make(FLYP, total_steps=None), tmp_path, **longer(epochs=1, warmup=2 / 3))
    with pytest.raises(ValueError, match=r"epochs was 1 and is 3 now\. The rate rose over 2 steps.*warmup=0.222222"):
        run(make(FLYP, total_steps=None), tmp_path, resume=True, **longer(warmup=2 / 3))
    run(method, tmp_path, resume=True, **longer(warmup=0.222222))
    run(whole, **longer(warmup=0.222222))
    assert same(state(method), state(whole))


@pytest.mark.parametrize("schedule", ["cosine", *exhaustive("linear")])
def test_a_falling_rate_is_not_made_longer_and_the_way_out_is_one(tmp_path, schedule):
    options = {"schedule": schedule, "limit_batches": 3}
    run(make(FLYP, total_steps=None), tmp_path / "run", epochs=1, **options)
    with pytest.raises(ValueError, match=f'epochs was 1 and is 2 now. A {schedule} schedule falls .*"constant"'):
        run(make(FLYP, total_steps=None), tmp_path / "run", resume=True, epochs=2, **options)
    method = make(FLYP, total_steps=None)
    run(method, tmp_path / "run", resume=True, epochs=1, **options)
    before = state(method)
    assert run(method, tmp_path / "more", epochs=1, **options).steps == 3
    assert not torch.equal(method.model.visual.proj, before["model.visual.proj"])
    first = load_checkpoint(tmp_path / "more" / "checkpoints" / "step_00000000").tensors
    assert torch.equal(first["method.model.visual.proj"], before["model.visual.proj"])


def test_a_method_with_a_schedule_over_the_run_is_not_made_longer_unless_it_knew(tmp_path):
    run(make(CaRot, total_steps=None), tmp_path, **longer(epochs=1))
    with pytest.raises(ValueError, match="CaRot has a schedule over the whole run.*give it total_steps"):
        run(make(CaRot, total_steps=None), tmp_path, resume=True, **longer())


def test_what_else_differs_is_refused_beside_a_longer_run(tmp_path):
    run(make(FLYP, total_steps=None), tmp_path, **longer(epochs=1))
    with pytest.raises(ValueError, match="epochs was 1 and is 3 now; lr was 0.01 and is 0.02 now$"):
        run(make(FLYP, total_steps=None), tmp_path, resume=True, **longer(lr=0.02))
