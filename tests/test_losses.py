"""The loss modules: open_clip's call convention, and the terms they add up."""

from __future__ import annotations

import planted
import pytest
import targets
import torch
import torch.nn.functional as F

from robustft import functional as rf
from robustft import losses
from robustft.losses import CaRotLoss, ClassificationLoss, ContrastiveLoss, DualRiskLoss, SigmoidContrastiveLoss

X, T = planted.pairs(12, 8)
XT, TT = planted.pairs(12, 8, seed=1)


def test_contrastive_loss_is_open_clips_clip_loss():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    for output_dict in (False, True):
        ours = ContrastiveLoss()(X, T, torch.tensor(20.0), output_dict=output_dict)
        theirs = open_clip_loss.ClipLoss()(X, T, torch.tensor(20.0), output_dict=output_dict)
        torch.testing.assert_close(ours, theirs)


def test_contrastive_loss_takes_what_clip_loss_takes():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    options = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "rank": 0, "world_size": 1}
    bias = torch.tensor(-3.0, requires_grad=True)
    ours, theirs = (kind(**options, use_horovod=False) for kind in (ContrastiveLoss, open_clip_loss.ClipLoss))
    found = ours(X, T, torch.tensor(20.0), logit_bias=bias)
    torch.testing.assert_close(found, theirs(X, T, torch.tensor(20.0)))
    (gradient,) = torch.autograd.grad(found, bias)
    assert gradient == 0
    for wrong in ({"use_horovod": True}, {"world_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ContrastiveLoss(**wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sigmoid_loss_and_its_gradients_are_open_clips_siglip_loss(dtype):
    open_clip_loss = pytest.importorskip("open_clip.loss")
    given = [*(f.to(dtype) for f in planted.pairs(300, 24)), *(torch.tensor(v, dtype=dtype) for v in (10.0, -4.0))]
    ours, theirs = (targets.gradients(kind(), *given) for kind in (SigmoidContrastiveLoss, open_clip_loss.SigLipLoss))
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 100)


def test_sigmoid_loss_takes_what_siglip_loss_takes():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    options = {"cache_labels": True, "rank": 0, "world_size": 1, "dist_impl": "gather"}
    ours, theirs = (kind(**options) for kind in (SigmoidContrastiveLoss, open_clip_loss.SigLipLoss))
    for bias in (torch.tensor(-3.0), None):
        for output_dict in (False, True):
            call = {"image_features": X, "text_features": T, "logit_scale": torch.tensor(20.0), "logit_bias": bias}
            torch.testing.assert_close(ours(**call, output_dict=output_dict), theirs(**call, output_dict=output_dict))
    torch.testing.assert_close(ours(X, T, 20.0, -3.0), theirs(X, T, 20.0, -3.0))
    for wrong in ({"dist_impl": "ring"}, {"world_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SigmoidContrastiveLoss(**wrong)


def test_gradients_over_all_ranks_are_what_an_average_over_ranks_makes_exact(monkeypatch):
    """The value stays, and the gradient is as many times larger as it will be divided."""
    with pytest.raises(RuntimeError, match="world_size is 4, but torch.distributed runs no processes"):
        ContrastiveLoss(world_size=4)(X, T, 20.0)
    monkeypatch.setattr(losses, "_all_ranks", lambda world_size: None)
    monkeypatch.setattr(losses, "contrastive_loss", lambda x, t, s, group, **options: (x * t).mean() * s)
    x = X.clone().requires_grad_()
    one, four = ContrastiveLoss()(x, T, 20.0), ContrastiveLoss(world_size=4)(x, T, 20.0)
    torch.testing.assert_close(four, one)
    torch.testing.assert_close(torch.autograd.grad(four, x)[0], 4 * torch.autograd.grad(one, x)[0])


def test_distillation_is_twice_open_clips():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    terms = rf.contrastive_distillation_loss(X, T, 20.0, XT, TT, 10.0)
    theirs = open_clip_loss.DistillClipLoss()(X, T, torch.tensor(20.0), XT, TT, torch.tensor(10.0), output_dict=True)
    torch.testing.assert_close(terms.contrastive, theirs["contrastive_loss"])
    torch.testing.assert_close(terms.distillation, 2 * theirs["distill_loss"])


def test_carot_dictionary_adds_up_to_its_loss():
    options = dict(
        teacher_image_features=XT,
        teacher_text_features=TT,
        teacher_logit_scale=10.0,
        visual_projection=torch.randn(10, 8, dtype=torch.float64),
        text_projection=torch.randn(6, 8, dtype=torch.float64),
    )
    loss = CaRotLoss()
    parts = loss(X, T, 20.0, **options, output_dict=True)
    assert list(parts) == ["contrastive_loss", "distillation_loss", "orthogonality_loss", "cross_loss"]
    torch.testing.assert_close(sum(parts.values()), loss(X, T, 20.0, **options))


def test_carot_without_a_teacher_is_its_first_step():
    assert CaRotLoss()(X, T, 20.0) == ContrastiveLoss()(X, T, 20.0)


def test_half_a_teacher_is_refused():
    with pytest.raises(ValueError, match="go together"):
        CaRotLoss()(X, T, 20.0, teacher_image_features=XT)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_perspectives_of_the_teacher_equal_their_plain_restatement(bias):
    """TRACER's terms, of samples with labels and weights, and their gradients."""
    y, weight, s, s0 = torch.arange(12) % 5, torch.rand(12, dtype=torch.float64), 20.0, 15.0
    x, t = (f.clone().requires_grad_() for f in (X, T))
    weights = {"feature_weight": 1.0, "cross_distillation_weight": 2.0, "interactive_weight": 3.0}
    loss = CaRotLoss(distillation_weight=0.0, orthogonality_weight=0.0, cross_weight=0.0, **weights)
    given = {"teacher_image_features": XT, "teacher_text_features": TT, "teacher_logit_scale": s0}
    given |= {"logit_bias": bias, "teacher_logit_bias": None if bias is None else -2.0, "labels": y, "weight": weight}
    terms = loss.terms(x, t, s, **given)
    same = (y[:, None] == y).double()
    each = {"feature": ((x - XT) ** 2 + (t - TT) ** 2).sum(1)}
    z, zt, p = s * x @ TT.T, s * t @ XT.T, s0 * XT @ TT.T  # image to the teacher's texts, text to its images
    if bias is None:
        soft = -(p.softmax(1) * z.log_softmax(1)).sum(1) - (p.T.softmax(1) * zt.log_softmax(1)).sum(1)
        hard = -(same / same.sum(1, keepdim=True) * (z.log_softmax(1) + zt.log_softmax(1))).sum(1) / 2
        each |= {"cross_distillation": soft, "interactive": hard}
        expected = {name: (weight * value).mean() for name, value in each.items()}
    else:
        crossed, plain = ((x, TT), (XT, t)), {"weight": weight}
        expected = {"feature": (weight * each["feature"]).mean()}
        expected["cross_distillation"] = sum(
            rf.sigmoid_contrastive_distillation_loss(*pair, s, bias, XT, TT, s0, -2.0, **plain).distillation
            for pair in crossed
        )
        expected["interactive"] = sum(
            rf.sigmoid_contrastive_loss(*pair, s, bias, labels=y, **plain) / 2 for pair in crossed
        )
    assert list(terms) == ["contrastive", *expected]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=1e-12)
        found, wanted = (torch.autograd.grad(v, (x, t), retain_graph=True) for v in (terms[name], value))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    parts = loss(x, t, s, **given, output_dict=True)
    torch.testing.assert_close(sum(parts.values()), loss(x, t, s, **given))


def test_perspectives_need_a_teacher_of_the_same_width_and_one_process():
    with pytest.raises(ValueError, match=r"teacher_image_features is \(12, 5\); expected \(12, 8\)"):
        CaRotLoss(feature_weight=1.0)(
            X, T, 20.0, teacher_image_features=XT[:, :5], teacher_text_features=TT[:, :5], teacher_logit_scale=20.0
        )
    with pytest.raises(ValueError, match="feature_weight, .* are 0.0, 0.0 and 1.0; expected 0 with a group"):
        CaRotLoss(interactive_weight=1.0, group=torch.distributed.ProcessGroup(0, 1))


def test_carot_with_biases_is_a_sum_of_sigmoids():
    loss, b, c = CaRotLoss(distillation_weight=1.5), torch.tensor(-3.0, dtype=torch.float64), -2.0
    teacher = {"teacher_image_features": XT, "teacher_text_features": TT, "teacher_logit_scale": 10.0}
    z, p = 20.0 * X @ T.T + b, (10.0 * XT @ TT.T + c).sigmoid()
    contrastive = F.softplus(-(2.0 * torch.eye(len(X)) - 1.0) * z).sum() / len(X)
    distillation = -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z)).sum() / len(X)
    found = loss(X, T, 20.0, logit_bias=b, teacher_logit_bias=c, **teacher)
    torch.testing.assert_close(found, contrastive + 1.5 * distillation)
    torch.testing.assert_close(loss(X, T, 20.0, logit_bias=b), contrastive)
    for half in ({"logit_bias": b}, {"teacher_logit_bias": c}):
        with pytest.raises(ValueError, match="logit_bias and teacher_logit_bias go together"):
            loss(X, T, 20.0, **half, **teacher)


def test_carot_terms_keep_their_precision_under_autocast():
    wv, wt = torch.randn(10, 8), torch.randn(6, 8)
    arguments = (X.float(), T.float(), 20.0)
    options = {"visual_projection": wv, "text_projection": wt, "output_dict": True}
    expected = CaRotLoss()(*arguments, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = CaRotLoss()(*arguments, **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert expected["cross_loss"].item() == pytest.approx(0.05 * (wv @ wt.T).norm().item())


def test_cross_penalty_names_a_projection_that_does_not_fit():
    with pytest.raises(ValueError, match=r"text_projection is \(6, 7\)"):
        rf.cross_penalty(torch.randn(10, 8), torch.randn(6, 7))


LABELS = torch.arange(12) % 5


def test_classification_dictionary_adds_up_to_its_loss():
    options = {"labels": LABELS, "bias": torch.arange(5.0, dtype=torch.float64), "weight": torch.rand(12)}
    loss = ClassificationLoss(misalignment_weight=0.5, variant="softplus", label_smoothing=0.1)
    parts = loss(X, T[:5], 20.0, **options, output_dict=True)
    assert list(parts) == ["cross_entropy_loss", "misalignment_loss"]
    torch.testing.assert_close(sum(parts.values()), loss(X, T[:5], 20.0, **options))
    z = 20 * X @ T[:5].T + options["bias"]
    each = F.cross_entropy(z, LABELS, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(parts["cross_entropy_loss"], (each * options["weight"]).mean())
    above = z > z.gather(1, LABELS[:, None])
    p = z.softmax(1)
    inverse = (p * above).sum(1) / p.gather(1, LABELS[:, None])[:, 0]
    torch.testing.assert_close(parts["misalignment_loss"], 0.5 * (options["weight"] * inverse.log1p()).mean())


def test_classification_loss_alone_is_cross_entropy():
    parts = ClassificationLoss()(X, T[:5], torch.tensor(20.0), labels=LABELS, output_dict=True)
    assert list(parts) == ["cross_entropy_loss"]
    torch.testing.assert_close(parts["cross_entropy_loss"], F.cross_entropy(20 * X @ T[:5].T, LABELS))


@pytest.mark.parametrize("soft", [True, False])
def test_dual_risk_dictionary_adds_up_to_its_loss(soft):
    q = torch.rand(12, 5, dtype=torch.float64) if soft else torch.rand(12, dtype=torch.float64)
    options = {"core_embeddings": TT[:5], "labels": LABELS, "core_labels": q}
    loss = DualRiskLoss(worst_case_weight=0.3)
    parts = loss(X, T[:5], 20.0, **options, output_dict=True)
    assert list(parts) == ["empirical_loss", "worst_case_loss"]
    torch.testing.assert_close(sum(parts.values()), loss(X, T[:5], 20.0, **options))
    torch.testing.assert_close(parts["empirical_loss"], F.cross_entropy(20 * X @ T[:5].T, LABELS))
    logs = (20 * X @ TT[:5].T).log_softmax(1)
    target = q if soft else q[:, None] * F.one_hot(LABELS, 5)
    torch.testing.assert_close(parts["worst_case_loss"], -0.3 * (target * logs).sum(1).mean())
