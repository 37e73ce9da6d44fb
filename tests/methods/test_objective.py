"""The objective of class heads: the fused form is the sum of its terms."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from robustft import functional as rf
from robustft.calibration.losses import focal_loss, rescale_to_range
from robustft.methods.objective import TERMS, Objective


@pytest.fixture
def head():
    x = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1).requires_grad_()
    w = F.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1).requires_grad_()
    s = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    return x, w, torch.arange(7) % 4, s, torch.randn(4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("misalignment", [0.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_objective_is_that_of_its_logits(head, misalignment, biased):
    x, w, y, s, b = head
    objective = Objective(label_smoothing=0.1, misalignment=misalignment, variant="softplus")
    z = s * (x @ w.T) + (b if biased else 0)
    leaves = (x, w, s, b) if biased else (x, w, s)
    fused, terms = objective(x, w, y, s, bias=b if biased else None)
    expected, expected_terms = objective.of_logits(z, y)
    torch.testing.assert_close((fused, terms), (expected, expected_terms))
    torch.testing.assert_close(torch.autograd.grad(fused, leaves), torch.autograd.grad(expected, leaves))
    by_hand = F.cross_entropy(z, y, label_smoothing=0.1) + misalignment * rf.misalignment_penalty(
        z, y, variant="softplus"
    )
    torch.testing.assert_close(fused, by_hand)


def test_a_term_adds_with_its_weight(head, monkeypatch):
    x, w, y, s, _ = head
    monkeypatch.setitem(TERMS, "square", lambda z, y: z.square().mean())
    z = s * (x @ w.T)
    loss, terms = Objective(terms={"square": 0.5})(x, w, y, s)
    torch.testing.assert_close(loss, F.cross_entropy(z, y) + 0.5 * z.square().mean())
    torch.testing.assert_close(terms["square"], z.square().mean().detach())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"misalignment": -1.0}, "misalignment"),
        ({"variant": "log"}, "variant"),
        ({"terms": {"brightness": 1.0}}, "brightness.*'logit_range'"),
        ({"rescale": "zero-shot"}, "rescale is 'zero-shot'"),
    ],
)
def test_bad_objective_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Objective(**bad)


ASKING = [Objective(terms={"logit_range": 1.0}), Objective(rescale="zero_shot", focal=2.0, terms={"brier": 0.5})]


@pytest.mark.parametrize("objective", ASKING, ids=["logit_range", "rescale"])
def test_what_compares_with_the_zero_shot_model_asks_for_its_logits(head, objective):
    x, w, y, s, b = head
    z0 = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert objective.needs_zero_shot and not Objective(terms={"logit_range": 0.0, "brier": 1.0}).needs_zero_shot
    fused = objective(x, w, y, s, bias=b, zero_shot_logits=z0)
    torch.testing.assert_close(fused, objective.of_logits(s * (x @ w.T) + b, y, z0))
    for given, got in ((None, "got None"), (z0[:3], r"got \(3, 4\)")):
        with pytest.raises(ValueError, match=rf"compare with the zero-shot model: expected zero_shot_logits.*{got}"):
            objective(x, w, y, s, zero_shot_logits=given)


def test_rescaled_logits_are_what_every_part_of_the_objective_sees(head):
    x, w, y, s, _ = head
    z, z0 = s * (x @ w.T), 3 * torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss, terms = Objective(rescale="zero_shot", focal=2.0, misalignment=0.5, terms={"brier": 0.3}).of_logits(z, y, z0)
    r = rescale_to_range(z, z0)
    by_hand = focal_loss(r, y, 2.0) + 0.5 * rf.misalignment_penalty(r, y) + 0.3 * TERMS["brier"](r, y)
    torch.testing.assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss, z)
    zero = torch.zeros(7, dtype=z.dtype)  # neither a shift nor a scale of a row of logits changes the loss
    torch.testing.assert_close((gradient.sum(1), (gradient * z).sum(1)), (zero, zero))


def test_an_objective_is_made_again_from_json():
    for objective in (*ASKING, Objective(label_smoothing=0.1, variant="ratio", top1=True)):
        assert Objective(**json.loads(json.dumps(dataclasses.asdict(objective)))) == objective
