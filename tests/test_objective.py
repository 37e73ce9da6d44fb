"""The objective of class heads: the fused form is the sum of its terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robustft import functional as rf
from robustft.objective import TERMS, Objective


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
        ({"terms": {"brightness": 1.0}}, "brightness"),
    ],
)
def test_bad_objective_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Objective(**bad)
