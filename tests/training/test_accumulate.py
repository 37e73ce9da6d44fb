"""`fit` with batches in parts: the weights of whole batches, in every precision, resumed and recomputed."""

from __future__ import annotations

import every_loss
import pytest
import torch
from targets import exhaustive
from test_fit import Stop, before_update, data, make, run, stop

from robustft.methods import FLYP, CaRot, FineTune, LinearProbe
from robustft.training.loop import fit


def fitted(name, **options):
    method, batch = every_loss.make(name), every_loss.data()
    settings = {"epochs": 2, "batch_size": 6, "lr": 1e-3, "progress": False}
    torch.manual_seed(1)
    history = fit(method, batch, **(settings | options))
    return method, history


@pytest.mark.parametrize("name", ["FLYP", "CaRot", "FineTune", "WorstCaseFineTune", *exhaustive(*every_loss.OPTIONS)])
def test_a_fit_in_parts_ends_with_the_same_weights(name):
    whole, history = fitted(name)
    if name == "MaPLe, of a batch":
        with pytest.raises(ValueError, match="parts must be 1 for MaPLe"):
            fitted(name, accumulate=4)
        return
    parts, of_parts = fitted(name, accumulate=4)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=1e-9, atol=1e-12)
    assert [r["loss"] for r in of_parts.records] == pytest.approx([r["loss"] for r in history.records], rel=1e-11)


@pytest.mark.parametrize("kind", [CaRot, *exhaustive(FineTune)])
def test_a_killed_run_in_parts_goes_on_bit_for_bit(kind, tmp_path):
    options = {"dropout": 0.5, **({} if kind is CaRot else {"total_steps": None})}
    whole = make(kind, **options)
    run(whole, tmp_path / "whole", accumulate=3)
    with pytest.raises(Stop):
        run(before_update(make(kind, **options), 5, stop), tmp_path / "killed", accumulate=3)
    again = make(kind, **options)
    run(again, tmp_path / "killed", accumulate=3, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    metrics = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("whole", "killed")]
    assert metrics[0] == metrics[1]


@pytest.mark.exhaustive
def test_another_number_of_parts_goes_on(tmp_path):
    with pytest.raises(Stop):
        run(before_update(make(FLYP), 5, stop), tmp_path, accumulate=2)
    assert run(make(FLYP), tmp_path, accumulate=4, resume=True).steps == 9


@pytest.mark.parametrize("kind", [FLYP, FineTune])
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"grad_checkpointing": True}])
def test_parts_go_with_precision_and_recomputing(kind, options):
    whole, parts = (make(kind, total_steps=None) for _ in range(2))
    known = run(whole, limit_batches=1, epochs=1, clip=None, **options).records[0]
    found = run(parts, limit_batches=1, epochs=1, clip=None, accumulate=3, **options).records[0]
    exact = options == {"grad_checkpointing": True}
    for name, value in known.items():
        assert found[name] == (value and pytest.approx(value, rel=1e-5 if exact else 0.02)), name


def test_features_are_taken_in_parts():
    images, labels = data()
    features = torch.nn.functional.normalize(images.flatten(1)[:, :8], dim=1)
    whole, parts = (make(LinearProbe, total_steps=None) for _ in range(2))
    run(whole, data=(features, labels))
    run(parts, data=(features, labels), accumulate=3)
    torch.testing.assert_close(parts.head, whole.head)


def test_a_number_of_parts_that_is_none_is_refused():
    with pytest.raises(ValueError, match="accumulate must be at most batch_size, 8, got 9"):
        run(make(FLYP), accumulate=9)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        run(make(FLYP), accumulate=0)
