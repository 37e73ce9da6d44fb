"""Calibration terms against their formulas, restated sample by sample in float64 with numpy."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robustft.calibration.losses import (
    brier_loss,
    confidence_penalty,
    dca_loss,
    focal_loss,
    logit_range_penalty,
    margin_penalty,
    mdca_loss,
    mmce_loss,
    rescale_to_range,
)
from robustft.methods.objective import TERMS, ZERO_SHOT_TERMS, Objective


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def tops(z, y):
    return [(softmax(row).max(), float(row.argmax() == label)) for row, label in zip(z, y, strict=True)]


def focal(z, y, gamma=3.0):
    return np.mean([-((1 - softmax(r)[k]) ** gamma) * math.log(softmax(r)[k]) for r, k in zip(z, y, strict=True)])


def brier(z, y):
    return np.mean([sum((p - (c == k)) ** 2 for c, p in enumerate(softmax(r))) for r, k in zip(z, y, strict=True)])


def dca(z, y):
    return abs(np.mean([c for c, _ in tops(z, y)]) - np.mean([a for _, a in tops(z, y)]))


def mdca(z, y):
    p = np.stack([softmax(row) for row in z])
    return np.mean([abs(p[:, k].mean() - np.mean([label == k for label in y])) for k in range(z.shape[1])])


def mmce(z, y, width=0.4):
    pairs = tops(z, y)
    total = sum((a - c) * (b - d) * math.exp(-abs(c - d) / width) for c, a in pairs for d, b in pairs)
    return math.sqrt(total / len(z) ** 2)


def mbls(z, y, margin=10.0):
    return np.mean([[max(0.0, row.max() - v - margin) for v in row] for row in z])


def negative_entropy(z, y):
    return np.mean([sum(p * math.log(p) for p in softmax(row)) for row in z])


def logit_range(z, y, low=-4.0, high=6.0):
    return np.mean([[max(0.0, v - high) + max(0.0, low - v) for v in row] for row in z])


ORACLES = {
    "focal": (focal_loss, focal),
    "focal at gamma 1.5": (functools.partial(focal_loss, gamma=1.5), functools.partial(focal, gamma=1.5)),
    "brier": (brier_loss, brier),
    "dca": (dca_loss, dca),
    "mdca": (mdca_loss, mdca),
    "mmce": (mmce_loss, mmce),
    "mmce of width 0.1": (functools.partial(mmce_loss, width=0.1), functools.partial(mmce, width=0.1)),
    "mbls": (margin_penalty, mbls),
    "mbls of margin 2": (functools.partial(margin_penalty, margin=2.0), functools.partial(mbls, margin=2.0)),
    "confidence penalty": (confidence_penalty, negative_entropy),
    "logit range": (functools.partial(logit_range_penalty, low=-4.0, high=6.0), logit_range),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = 5 * torch.randn(12, 4, dtype=torch.float64, generator=generator)
    return z.requires_grad_(), torch.randint(0, 4, (12,), generator=generator)


@pytest.mark.parametrize("name", ORACLES)
def test_each_term_is_its_formula_and_its_gradient_the_difference_quotient(name, batch):
    z, y = batch
    term, oracle = ORACLES[name]
    value = term(z, y)
    assert value.shape == () and value > 0 or name == "confidence penalty"
    np.testing.assert_allclose(value.detach(), oracle(z.detach().numpy(), y.numpy()), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: term(x, y), z)


@pytest.mark.parametrize("name", ORACLES)
def test_half_precision_and_autocast_are_computed_in_float32(name, batch):
    z, y = batch[0].detach().bfloat16(), batch[1]
    term, _ = ORACLES[name]
    expected = term(z.double(), y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = term(z, y)
    for value in (inside, term(z, y)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_certain_and_constant_rows_keep_values_and_gradients_finite(name):
    z = torch.tensor([[200.0, 0.0, -200.0], [0.0, 200.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    value = ORACLES[name][0](z, torch.tensor([0, 0, 2]))
    (gradient,) = torch.autograd.grad(value, z)
    assert value.isfinite() and gradient.isfinite().all()


def test_focal_loss_at_zero_is_cross_entropy_and_ignores_the_certain(batch):
    z, y = batch
    torch.testing.assert_close(focal_loss(z, y, 0.0), F.cross_entropy(z, y))
    sure = torch.tensor([[60.0, 0.0]], requires_grad=True)
    loss = focal_loss(sure, torch.tensor([0]), 0.5)  # in probabilities (1 - 1)^-0.5 would be infinite
    assert torch.autograd.grad(loss, sure)[0].abs().max() < 1e-6


def test_perfectly_calibrated_batches_have_no_dca_mdca_or_mmce():
    z = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)  # uniform; argmax is class 0, right in one of four
    y = torch.arange(4)
    for term in (dca_loss, mdca_loss, mmce_loss):
        value = term(z, y)
        assert value == 0 and (torch.autograd.grad(value, z)[0] == 0).all()


def test_overconfident_errors_are_pushed_down_by_every_batch_measure():
    z = torch.tensor([[4.0, 0.0], [4.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 1])  # confidence .98, accuracy one half
    for term in (dca_loss, mmce_loss, brier_loss, confidence_penalty):
        gradient = torch.autograd.grad(term(z, y), z)[0]
        assert (gradient[:, 0].sum() > 0) and (gradient[:, 1].sum() < 0)


def test_squared_mmce_is_the_square(batch):
    torch.testing.assert_close(mmce_loss(*batch, squared=True), mmce_loss(*batch).square())


def test_logit_range_takes_a_range_for_each_sample(batch):
    z, y = batch
    z0 = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    low, high = z0.amin(1, keepdim=True), z0.amax(1, keepdim=True)
    rows = [logit_range(z[i : i + 1].detach().numpy(), None, float(low[i]), float(high[i])) for i in range(12)]
    torch.testing.assert_close(logit_range_penalty(z, y, low, high).item(), float(np.mean(rows)))
    assert logit_range_penalty(rescale_to_range(z, z0), y, low, high) < 1e-14


def test_rescaling_takes_over_the_range_and_keeps_the_order(batch):
    z, z0 = batch[0], torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    scaled = rescale_to_range(z, z0)
    torch.testing.assert_close(scaled.amax(1), z0.amax(1))
    torch.testing.assert_close(scaled.amin(1), z0.amin(1))
    assert scaled.argsort(1).equal(z.argsort(1))
    torch.testing.assert_close(rescale_to_range(2 * z + 5, z0), scaled)
    flat = torch.ones(1, 3, requires_grad=True)
    middle = rescale_to_range(flat, torch.tensor([[0.0, 4.0]]))
    assert middle.tolist() == [[2.0, 2.0, 2.0]]
    assert torch.autograd.grad(middle.sum(), flat)[0].isfinite().all()


@pytest.mark.parametrize("name", sorted(TERMS))
def test_registered_terms_add_to_the_objective_with_their_weight(name, batch):
    z, y = batch
    loss, terms = Objective(terms={name: 0.25}).of_logits(z, y)
    torch.testing.assert_close(loss, F.cross_entropy(z, y) + 0.25 * TERMS[name](z, y))
    torch.testing.assert_close(terms[name], TERMS[name](z, y).detach())


def test_logit_range_by_name_has_each_samples_own_range_and_gives_it_no_gradient(batch):
    z, y = batch
    z0 = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss, terms = Objective(terms={"logit_range": 0.25}).of_logits(z, y, z0)
    rows = [logit_range(z[i : i + 1].detach().numpy(), None, z0[i].min().item(), z0[i].max().item()) for i in range(12)]
    torch.testing.assert_close(terms["logit_range"].item(), float(np.mean(rows)))
    torch.testing.assert_close(loss, F.cross_entropy(z, y) + 0.25 * terms["logit_range"])
    assert torch.autograd.grad(loss, z0, allow_unused=True) == (None,)
    assert not TERMS.keys() & ZERO_SHOT_TERMS.keys()


def test_focal_takes_the_place_of_cross_entropy_in_both_forms_of_the_objective():
    x = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1).requires_grad_()
    w, y = F.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1), torch.arange(7) % 4
    objective = Objective(focal=2.0, misalignment=0.5)
    loss, terms = objective(x, w, y, 9.0)
    z = 9.0 * x @ w.T
    torch.testing.assert_close((loss, terms), objective.of_logits(z, y))
    torch.testing.assert_close(loss - 0.5 * terms["misalignment"], focal_loss(z, y, 2.0))
    assert set(terms) == {"focal", "misalignment"}
    with pytest.raises(ValueError, match="focal is 2.0, label_smoothing 0.1: use one of them"):
        Objective(focal=2.0, label_smoothing=0.1)
    with pytest.raises(ValueError, match="focal is -1.0"):
        Objective(focal=-1.0)


def test_another_setting_is_another_name(batch, monkeypatch):
    monkeypatch.setitem(TERMS, "mbls_2", functools.partial(margin_penalty, margin=2.0))
    loss, _ = Objective(terms={"mbls_2": 0.1}).of_logits(*batch)
    torch.testing.assert_close(loss, F.cross_entropy(*batch) + 0.1 * margin_penalty(*batch, margin=2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: brier_loss(z[0], y), r"logits is \(4,\).*expected floating \(N, K\)"),
        (lambda z, y: brier_loss(z, y[:3]), r"labels is \(3,\).*expected \(12,\)"),
        (lambda z, y: brier_loss(z, y.int()), "expected .* torch.int64"),
        (lambda z, y: focal_loss(z, y, -1.0), "gamma is -1.0"),
        (lambda z, y: focal_loss(z[:, :1], y * 0), "at least two classes"),
        (lambda z, y: mmce_loss(z, y, 0.0), "width is 0.0"),
        (lambda z, y: margin_penalty(z, y, -1.0), "margin is -1.0"),
        (lambda z, y: logit_range_penalty(z, y, torch.zeros(12), 1.0), r"low has shape \(12,\)"),
        (lambda z, y: rescale_to_range(z, z[:5]), "of one N"),
    ],
)
def test_bad_input_is_refused_by_name(call, message, batch):
    with pytest.raises(ValueError, match=message):
        call(*batch)
