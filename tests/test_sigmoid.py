"""The sigmoid losses of every body against the float64 reference, and their properties."""

from __future__ import annotations

import math
from functools import partial

import planted
import pytest
import torch
from targets import assert_as_accurate_as_eager, case, each_body, each_device, each_target, exhaustive, gradients, sizes

import robustft
from robustft import functional as rf

# Below, at and above a tile's sides.
SHAPES = sizes([(1, 1), (2, 37), (257, 16), (530, 37)], [(1, 1), (2, 37), (32, 16), (35, 20)])
# As SigLIP begins and ends, and with as many wrong as right decisions.
NUMBERS = [(10.0, -10.0), *exhaustive((117.3, -12.9), (100.0, 0.0))]


@each_target
@pytest.mark.parametrize(("scale", "bias"), NUMBERS)
@pytest.mark.parametrize("variant", ["plain", "labels", "single losses", "nothing kept"])
def test_loss_is_as_accurate_as_eager(scale, bias, target, variant):
    options = (
        {"reduction": "none"} if variant == "single losses" else {"memory": 0 if variant == "nothing kept" else "auto"}
    )

    def loss(labels, x, t, s, b, w):
        return rf.sigmoid_contrastive_loss(x, t, s, b, labels=labels, weight=w, **options).mean()

    for n, d in SHAPES:
        with case(n, d):
            labels = torch.randint(0, max(1, n // 4), (n,)).to(target.device) if variant != "plain" else None
            inputs = (*planted.pairs(n, d), torch.tensor(scale), torch.tensor(bias), torch.rand(n))
            assert_as_accurate_as_eager(partial(loss, labels), *inputs, target=target)


@each_target
@pytest.mark.parametrize(("scale", "bias"), NUMBERS)
def test_distillation_is_as_accurate_as_eager(scale, bias, target):
    def loss(labels, xt, tt, x, t, s, b, w):
        teacher = (xt.to(x.dtype), tt.to(x.dtype), 0.7 * scale, 0.6 * bias)
        return rf.sigmoid_contrastive_distillation_loss(x, t, s, b, *teacher, labels=labels, weight=w)

    for n, d in SHAPES:
        with case(n, d):
            labels = torch.randint(0, max(1, n // 2), (n,)).to(target.device)
            teacher = (f.to(target.device, target.dtype) for f in planted.pairs(n, d + 3, seed=1))
            inputs = (*planted.pairs(n, d), torch.tensor(scale), torch.tensor(bias), torch.rand(n))
            assert_as_accurate_as_eager(partial(loss, labels, *teacher), *inputs, target=target)


@each_body
def test_distillation_is_the_cross_entropy_of_torch(target):
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(35, 16))
    xt, tt = (f.to(target.device, target.dtype) for f in planted.pairs(35, 9, seed=1))

    def eager(x, t, s, b):
        p = (20.0 * xt @ tt.T - 3.0).sigmoid()
        return torch.nn.functional.binary_cross_entropy_with_logits(s * x @ t.T + b, p, reduction="none").sum(1).mean()

    def fused(x, t, s, b):
        return rf.sigmoid_contrastive_distillation_loss(x, t, s, b, xt, tt, 20.0, -3.0).distillation

    numbers = (torch.tensor(v, dtype=target.dtype, device=target.device) for v in (10.0, -4.0))
    given = x, t, *numbers
    with robustft.backend(target.backend):
        ours = gradients(fused, *given)
    torch.testing.assert_close(ours, gradients(eager, *given), rtol=1e-5, atol=1e-6)


@each_body
def test_reductions_and_what_is_kept_change_only_rounding(target):
    n = sizes([300], [35])[0]
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(n, 16))
    weight, labels = torch.rand(n).to(target.device, target.dtype), torch.arange(n, device=target.device) // 3

    def of(reduction, memory):
        def loss(x, t, w):
            options = {"weight": w, "labels": labels, "reduction": reduction, "memory": memory}
            each = rf.sigmoid_contrastive_loss(x, t, 20.0, -5.0, **options)
            assert each.shape == ((n,) if reduction == "none" else ())
            return {"mean": n * each, "sum": each, "none": each.sum()}[reduction]

        with robustft.backend(target.backend):
            return gradients(loss, x, t, weight)

    expected = of("none", 0)
    for reduction, memory in ("none", "auto"), ("mean", "auto"), ("mean", 0), ("sum", "auto"), ("sum", 0):
        torch.testing.assert_close(of(reduction, memory), expected, rtol=2e-6, atol=1e-6)


@each_body
def test_keeping_similarities_of_a_teacher_equals_computing_them_again(target):
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(sizes([700], [35])[0], 16))

    def of(memory):
        def terms(x, t, s, b):
            teacher = t.detach(), x.detach(), 30.0, -4.0
            return rf.sigmoid_contrastive_distillation_loss(x, t, s, b, *teacher, memory=memory)

        with robustft.backend(target.backend):
            return gradients(terms, x, t, x.new_tensor(20.0), x.new_tensor(-5.0))

    for a, b in zip(of("auto"), of(0), strict=True):
        assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())


@each_body
def test_one_pair_has_one_decision(target):
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(1, 8))
    cosine = (x * t).sum().item()
    with robustft.backend(target.backend):
        value, dx, dt, ds, db = gradients(
            rf.sigmoid_contrastive_loss, x, t, *(v.to(x) for v in (torch.tensor(3.0), torch.tensor(-2.0)))
        )
    z = 3 * cosine - 2
    assert value.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-6)
    assert db.item() == pytest.approx(-1 / (1 + math.exp(z)), rel=1e-6)
    assert ds.item() == pytest.approx(db.item() * cosine, rel=1e-6)
    torch.testing.assert_close(dx, db * 3 * t.double(), rtol=1e-6, atol=1e-9)


@each_body
def test_far_from_every_decision_nothing_is_lost_or_infinite(target):
    n = sizes([300], [35])[0]
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(n, 16))
    with robustft.backend(target.backend):
        for bias, expected in ((-1e4, 1e4), (1e4, (n - 1) * 1e4)):
            found = gradients(lambda x, t, b: rf.sigmoid_contrastive_loss(x, t, 1.0, b), x, t, x.new_tensor(bias))
            assert found[0].item() == pytest.approx(expected, rel=1e-3)
            assert all(part.isfinite().all() for part in found)
        # -z = 80: exp(-80) is all that is left of a loss, and counts.
        far = rf.sigmoid_contrastive_loss(0 * x[:2], t[:2], 1.0, -80.0, reduction="none")
        torch.testing.assert_close(far.double(), far.new_tensor([80.0, 80.0]).double())
        distilled = rf.sigmoid_contrastive_distillation_loss(0 * x, t, 1.0, -60.0, 0 * x, t, 1.0, -60.0).distillation
        assert distilled.item() == pytest.approx(n * 61 * math.exp(-60), rel=1e-5)


@each_body
def test_labels_make_pairs_of_all_that_share_one(target):
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(24, 8))
    labels = torch.arange(24, device=target.device) // 5 * 10**12 - 7
    with robustft.backend(target.backend):
        each = rf.sigmoid_contrastive_loss(x, t, 5.0, -1.0, labels=labels, reduction="none")
        distinct = rf.sigmoid_contrastive_loss(x, t, 5.0, -1.0, labels=torch.arange(24, device=target.device) * 3)
        plain = rf.sigmoid_contrastive_loss(x, t, 5.0, -1.0)
    z = 5.0 * x @ t.T - 1
    expected = torch.nn.functional.softplus(torch.where(labels[:, None] == labels, -z, z)).sum(1)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)
    assert distinct == plain


@each_body
def test_a_student_that_is_its_teacher_has_no_gradient_of_distillation(target):
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(35, 16))
    with robustft.backend(target.backend):
        found = gradients(
            lambda x, t, s, b: (
                rf.sigmoid_contrastive_distillation_loss(x, t, s, b, x.detach(), t.detach(), 20.0, -3.0).distillation
            ),
            *(x, t, x.new_tensor(20.0), x.new_tensor(-3.0)),
        )
    for part in found[1:]:
        assert part.abs().max() <= 1e-5


@each_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_in_the_features_reach_the_loss(bad, target):
    x, t = (f.to(target.device, torch.float32) for f in planted.pairs(sizes([300], [35])[0], 16))
    x[7, 3] = bad
    with robustft.backend(target.backend):
        each = rf.sigmoid_contrastive_loss(x, t, 10.0, -5.0, reduction="none")
        assert not each[7].isfinite() and each[:7].isfinite().all()
        x[7, 3] = 0.1
        for scale, bias in ((torch.nan, 0.0), (1.0, torch.nan)):
            given = torch.tensor(scale, device=target.device), torch.tensor(bias, device=target.device)
            assert rf.sigmoid_contrastive_loss(x, t, *given).isnan()


@each_device
def test_repeating_a_computation_repeats_its_bits(target):
    x, t = (f.to(target.device, torch.float32) for f in planted.pairs(sizes([700], [35])[0], 64))
    with robustft.backend(target.backend):
        first, second = (gradients(lambda x, t: rf.sigmoid_contrastive_loss(x, t, 50.0, -5.0), x, t) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_device
def test_gradients_of_single_losses_and_of_none_are_right(target):
    x, t = (f.to(target.device, torch.float32).requires_grad_() for f in planted.pairs(40, 12))
    teacher = [f.detach() + 0.01 for f in (x, t)]

    def values():
        terms = rf.sigmoid_contrastive_distillation_loss(x, t, 20.0, -3.0, *teacher, 9.0, -2.0, reduction="none")
        picked = (terms.contrastive[3] + 2 * terms.distillation[::2].sum(), terms.distillation.sum())
        return [g for value in picked for g in torch.autograd.grad(value, (x, t), retain_graph=True)]

    with robustft.backend(target.backend):
        ours = values()
    with robustft.backend("reference"):
        for a, b in zip(ours, values(), strict=True):
            assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


@pytest.mark.parametrize("bias", [torch.zeros(2), torch.tensor(True), "none"])
def test_a_bias_that_is_no_number_is_refused(bias):
    x, t = planted.pairs(4, 3)
    with pytest.raises((TypeError, ValueError), match="logit_bias is|logit_bias has"):
        rf.sigmoid_contrastive_loss(x, t, 10.0, bias)
    with pytest.raises((TypeError, ValueError), match="teacher_logit_bias"):
        rf.sigmoid_contrastive_distillation_loss(x, t, 10.0, -1.0, x, t, 10.0, bias)
