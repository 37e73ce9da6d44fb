"""The public losses against the float64 reference, and their properties."""

from __future__ import annotations

import math

import planted
import pytest
import torch
from torch import Tensor

import robustft
from robustft import functional as rf
from robustft.ops import reference

SHAPES = [
    (1, 1),
    (2, 37),
    (7, 128),
    (255, 37),
    (256, 16),
    (257, 16),
    (1031, 37),
]  # below, at and above a tile's sides
SCALES = [1.0, 14.3, 100.0]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with robustft.backend(request.param):
        yield request.param


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    """The function's summed outputs' value and gradient by each input, in float64."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    out = function(*leaves)
    value = out if isinstance(out, Tensor) else sum((k + 1) * term for k, term in enumerate(out))
    value.backward()
    return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def assert_as_accurate_as_eager(function, *inputs: Tensor, dtype: torch.dtype) -> None:
    """For the value and each gradient: error <= 3 x the error of eager in the same dtype + 1e-6 of its largest entry.

    A float32 product of unit vectors is uncertain by about 1e-7 however it is computed, and s = 100 magnifies that in
    what cancels; hence also an absolute 1e-6. Against float64 eager on the same rounded inputs.
    """
    rounded = [i.to(dtype) for i in inputs]
    with robustft.backend("native"):
        ours = gradients(function, *rounded)
    with robustft.backend("reference"):
        exact = gradients(function, *(i.double() for i in rounded))
        eager = gradients(function, *rounded)
    unit = 1e-13 if dtype == torch.float64 else 1e-6
    for a, b, c in zip(ours, exact, eager, strict=True):
        assert (a - b).abs().max() <= 3 * (c - b).abs().max() + unit * (1 + b.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["plain", "labels", "smoothing"])
def test_contrastive_loss_is_as_accurate_as_eager(shape, scale, dtype, variant):
    n, d = shape
    labels = torch.randint(0, max(1, n // 4), (n,)) if variant != "plain" else None
    smoothing = 0.1 if variant == "smoothing" else 0.0

    def loss(x, t, s, w):
        return rf.contrastive_loss(x, t, s, labels=labels, label_smoothing=smoothing, weight=w)

    inputs = (*planted.pairs(n, d), torch.tensor(scale), torch.rand(n))
    assert_as_accurate_as_eager(loss, *inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_distillation_loss_is_as_accurate_as_eager(shape, scale, dtype):
    n, d = shape
    labels = torch.randint(0, max(1, n // 2), (n,))
    xt, tt = (f.to(dtype) for f in planted.pairs(n, d + 3, seed=1))

    def loss(x, t, s, w):
        teacher = (xt.to(x.dtype), tt.to(x.dtype), 0.7 * scale)
        return rf.contrastive_distillation_loss(x, t, s, *teacher, labels=labels, weight=w)

    inputs = (*planted.pairs(n, d), torch.tensor(scale), torch.rand(n))
    assert_as_accurate_as_eager(loss, *inputs, dtype=dtype)


def test_loss_equals_clips_cross_entropies(backend):
    x, t = planted.pairs(50, 16)
    z = 14.3 * x @ t.T
    target = torch.arange(50)
    expected = (torch.nn.functional.cross_entropy(z, target) + torch.nn.functional.cross_entropy(z.T, target)) / 2
    torch.testing.assert_close(rf.contrastive_loss(x, t, 14.3), expected)


def test_reductions_agree(backend):
    x, t = planted.pairs(33, 16)
    weight = torch.rand(33, dtype=torch.float64)
    each = rf.contrastive_loss(x, t, 10.0, weight=weight, reduction="none")
    assert each.shape == (33,)
    torch.testing.assert_close(rf.contrastive_loss(x, t, 10.0, weight=weight, reduction="sum"), each.sum())
    torch.testing.assert_close(rf.contrastive_loss(x, t, 10.0, weight=weight), each.sum() / 33)


def test_distinct_labels_change_nothing(backend):
    x, t = planted.pairs(40, 16)
    labels = torch.randperm(40) * 10**12 - 7  # any integers, negative and beyond 32 bits too
    assert rf.contrastive_loss(x, t, 14.3, labels=labels) == rf.contrastive_loss(x, t, 14.3)


def test_loss_is_symmetric_in_images_and_texts(backend):
    x, t = planted.pairs(300, 16)
    torch.testing.assert_close(rf.contrastive_loss(x, t, 50.0), rf.contrastive_loss(t, x, 50.0), rtol=1e-13, atol=0)


def test_permuting_samples_permutes_losses(backend):
    x, t = planted.pairs(300, 16)
    order = torch.randperm(300)
    each = rf.contrastive_loss(x, t, 50.0, reduction="none")
    torch.testing.assert_close(rf.contrastive_loss(x[order], t[order], 50.0, reduction="none"), each[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_label_loss_is_never_negative(dtype, backend):
    x, t = planted.pairs(512, 64, noise=0.01)
    each = rf.contrastive_loss(x.to(dtype), t.to(dtype), 100.0, reduction="none")
    assert (each >= 0).all()


@pytest.mark.parametrize("case", ["identical rows", "opposite pairs", "huge scale"])
def test_extreme_features_stay_finite(case, backend):
    x, t = (f.float() for f in planted.pairs(300, 32))
    scale = 100.0
    if case == "identical rows":
        x, t = x[:1].expand(300, 32), t[:1].expand(300, 32)
    elif case == "opposite pairs":
        t = -x
    else:
        scale = 1e4
    value, dx, dt = gradients(lambda x, t: rf.contrastive_loss(x, t, scale), x, t)
    assert value.isfinite() and dx.isfinite().all() and dt.isfinite().all()
    if case == "identical rows":
        assert value.item() == pytest.approx(math.log(300), rel=1e-6)


def test_distillation_from_itself_is_the_entropy_and_has_no_gradient(backend):
    x, t = planted.pairs(60, 16)
    z = 14.3 * x @ t.T
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1) - (z.softmax(0) * z.log_softmax(0)).sum(0)

    def distillation(a, b):
        return rf.contrastive_distillation_loss(a, b, 14.3, x, t, 14.3).distillation

    value, dx, dt = gradients(distillation, x, t)
    assert value.item() == pytest.approx(entropy.mean().item(), rel=1e-12)
    assert dx.abs().max() < 1e-14 and dt.abs().max() < 1e-14


def test_distillation_survives_underflowing_student_probabilities(backend):
    x, t = (f.float() for f in planted.pairs(64, 32))
    xt, tt = (f.float() for f in planted.pairs(64, 32, seed=5))
    terms = rf.contrastive_distillation_loss(x, t, 1000.0, xt, tt, 1.0)
    assert terms.distillation.isfinite() and terms.distillation > 0


def test_teacher_gets_no_gradient(backend):
    x, t = (f.requires_grad_() for f in planted.pairs(8, 16))
    xt, tt = (f.requires_grad_() for f in planted.pairs(8, 16, seed=1))
    sum(rf.contrastive_distillation_loss(x, t, 10.0, xt, tt, 10.0)).backward()
    assert x.grad is not None and xt.grad is None and tt.grad is None


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "misaligned"])
def test_any_strides_give_the_same_loss_and_gradients(layout):
    x, t = (f.float() for f in planted.pairs(70, 24))
    match layout:
        case "transposed":
            other = x.T.contiguous().T
        case "strided":
            other = torch.stack((x, x), 2).reshape(70, 48)[:, ::2]
        case "expanded":
            x = x[:1].expand(70, 24)
            other = x.contiguous()
        case _:
            other = torch.cat((torch.zeros(1), x.flatten()))[1:].view(70, 24)
    results = []
    for version in (x, other):
        leaf = version.detach().requires_grad_()
        value = rf.contrastive_loss(leaf, t, 20.0)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1031, 37), (256, 16)])
def test_gradient_errors_are_small_against_the_gradients_themselves(size, dtype):
    # At s = 100 most gradients are far below 1: a bound in absolute terms would let a wrong kernel pass.
    x, t = (f.to(dtype) for f in planted.pairs(*size, noise=2.0))

    def loss(x, t, s):
        terms = rf.contrastive_distillation_loss(x, t, s, t.detach(), x.detach(), 20.0)
        return terms.contrastive + terms.distillation

    with robustft.backend("native"):
        ours = gradients(loss, x, t, torch.tensor(50.0))
    with robustft.backend("reference"):
        exact = gradients(loss, x.double(), t.double(), torch.tensor(50.0, dtype=torch.float64))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_autocast_changes_nothing(backend):
    x, t = (f.float().requires_grad_() for f in planted.pairs(60, 16))
    labels = torch.arange(60) % 7
    w = planted.pairs(7, 16)[0].float()
    s = torch.tensor(100.0)

    def everything():
        return [
            rf.contrastive_loss(x, t, s),
            *rf.contrastive_distillation_loss(x, t, s, t, x, 50.0),
            *rf.classification_loss(x, w, labels, s),
            *rf.dual_risk(x, w, w.flip(0), labels, torch.rand(60, 7, generator=torch.Generator().manual_seed(0)), s),
            rf.misalignment_penalty(x @ w.T, labels),
            rf.orthogonality_penalty(x),
        ]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(everything()[:-2], expected[:-2], strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        assert torch.equal(rf.orthogonality_penalty(x), expected[-1])


def test_repeating_a_computation_repeats_its_bits():
    x, t = (f.float() for f in planted.pairs(700, 64))
    first, second = (gradients(lambda x, t: rf.contrastive_loss(x, t, 50.0), x, t) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_in_a_feature_reaches_the_loss(backend):
    x, t = (f.float() for f in planted.pairs(300, 16))
    x[270, 3] = torch.nan
    assert rf.contrastive_loss(x, t, 10.0).isnan()


def test_scale_gradient_matches_finite_differences():
    x, t = planted.pairs(300, 16)
    s = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    rf.contrastive_loss(x, t, s).backward()
    with torch.no_grad():
        slope = (rf.contrastive_loss(x, t, s + 1e-4) - rf.contrastive_loss(x, t, s - 1e-4)) / 2e-4
    assert s.grad.item() == pytest.approx(slope.item(), rel=1e-6)


def test_orthogonality_penalty_of_known_matrices():
    assert rf.orthogonality_penalty(torch.eye(5)[:, :3]) == 0
    w = 2 * torch.eye(4, dtype=torch.float64)
    assert rf.orthogonality_penalty(w).item() == pytest.approx(6.0)  # || 3 I_4 ||_F
    assert rf.orthogonality_penalty(w, squared=True).item() == pytest.approx(36.0)


def test_orthogonality_penalty_has_zero_gradient_at_its_minimum():
    w = torch.eye(4, requires_grad=True)
    rf.orthogonality_penalty(w).backward()
    assert torch.equal(w.grad, torch.zeros(4, 4))


@pytest.mark.parametrize("squared", [False, True])
def test_orthogonality_penalty_gradient(squared):
    w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w: rf.orthogonality_penalty(w, squared=squared), w)


def test_group_risk_of_known_losses(backend):
    losses = torch.tensor([1.0, 3.0, 10.0, 2.0], requires_grad=True)
    risk = rf.group_risk(losses, torch.tensor([0, 0, 2, 0]), 4)
    assert risk.mean.tolist() == [2.0, 0.0, 10.0, 0.0] and risk.counts.tolist() == [3, 0, 1, 0]
    assert risk.worst == 10.0
    risk.worst.backward()
    assert losses.grad.tolist() == [0.0, 0.0, 1.0, 0.0]


X, T = (f.float() for f in planted.pairs(4, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_features": T[:3]}, ValueError, r"text_features has shape \(3, 8\); expected \(4, 8\)"),
        ({"text_features": T[:, :5]}, ValueError, r"text_features has shape \(4, 5\)"),
        ({"image_features": X[0]}, ValueError, r"image_features has shape \(8,\); expected \(N, D\)"),
        ({"image_features": X.int()}, TypeError, "image_features is torch.int32"),
        ({"image_features": [[1.0]]}, TypeError, "image_features is list"),
        ({"image_features": X[:0], "text_features": T[:0]}, ValueError, "image_features has no rows"),
        ({"text_features": T.to("meta")}, ValueError, "text_features is on meta; expected cpu"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale has shape \(2,\)"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale is -1"),
        ({"logit_scale": torch.tensor(-1.0)}, RuntimeError, "logit_scale is -1"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels is list"),
        ({"weight": [1.0]}, TypeError, "weight is list"),
        ({"labels": torch.arange(3)}, ValueError, r"labels has shape \(3,\); expected \(4,\)"),
        ({"labels": torch.rand(4)}, TypeError, "labels is torch.float32; expected integers"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"weight": torch.ones(3)}, ValueError, r"weight is \(3,\)"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"image_features": X, "text_features": T, "logit_scale": 10.0} | change
    with pytest.raises(error, match=message):
        rf.contrastive_loss(**arguments)


def test_teacher_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="teacher_image_features has 3 rows; expected 4"):
        rf.contrastive_distillation_loss(X, T, 10.0, X[:3], T[:3], 10.0)


def test_group_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"groups holds 0..3; expected values in \[0, 3\)"):
        rf.group_risk(torch.ones(4), torch.arange(4), 3)


def test_group_risk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        rf.group_risk(torch.ones(0), torch.ones(0, dtype=torch.int64), 2)


def test_a_gpus_backend_does_not_pretend_on_the_cpu():
    with robustft.backend("triton"), pytest.raises(RuntimeError, match="no such kernel"):
        rf.contrastive_loss(X, T, 10.0)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'fast'"), robustft.backend("fast"):
        pass


def test_reference_statistics_are_the_kernels(backend):
    if backend == "reference":
        ops = reference
    else:
        rf.contrastive_loss(X, T, 1.0)
        ops = torch.ops.robustft
    x, t = planted.pairs(9, 5)
    xt, tt = planted.pairs(9, 6, seed=2)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4])
    inputs = (x, t[:7], torch.tensor(9.0), labels, labels[:7], xt, tt[:7], torch.tensor(4.0))
    options = () if backend == "reference" else (True, False, "highest")
    row, col, *_ = ops.similarity_statistics(*inputs, *options)
    z = 9 * x @ t[:7].T
    torch.testing.assert_close(9 * row[0] + row[1], z.logsumexp(1))
    torch.testing.assert_close(9 * col[0] + col[1], z.logsumexp(0))
    p = (4 * xt @ tt[:7].T).softmax(0)
    torch.testing.assert_close(col[7] + col[0], (p * (x @ t[:7].T)).sum(0))


def wide_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Pairs among which cosines reach from -1 to 1, so that logits of scale 100 span 200."""
    x, t = planted.pairs(n, 24)
    x[1::7], t[1::7] = -x[::7][: len(x[1::7])], -t[::7][: len(t[1::7])]
    return x, t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["auto", 0])
@pytest.mark.parametrize("n", [50, 700])
def test_tiles_too_wide_for_one_exponential_are_as_accurate(n, memory, dtype):
    xt, tt = (f.to(dtype) for f in wide_pairs(n))

    def losses(x, t, s):
        teacher = (xt.to(x.dtype), tt.to(x.dtype), 90.0)
        return rf.contrastive_distillation_loss(x, t, s, *teacher, memory=memory)

    s = torch.tensor(100.0 if dtype != torch.float64 else 900.0)
    if robustft.build_info().get("native"):
        x, t = (f.to(dtype) for f in wide_pairs(n))
        index = torch.arange(n)
        arguments = (x, t, s, index, index, None, None, None, False, False, "highest")
        assert torch.ops.robustft.similarity_statistics(*arguments)[2].isnan().any()  # they are that wide
    assert_as_accurate_as_eager(losses, *wide_pairs(n), s, dtype=dtype)


@pytest.mark.parametrize("n", [9, 300, 2100])
def test_keeping_exponentials_equals_computing_them_again(n):
    x, t = (f.float() for f in planted.pairs(n, 16))
    labels = torch.arange(n) // 2

    def kept(memory):
        def losses(x, t):
            teacher = (x.detach() + 0.01, t.detach(), 25.0)
            terms = rf.contrastive_distillation_loss(x, t, 40.0, *teacher, labels=labels, memory=memory)
            return *terms, rf.contrastive_loss(x, t, 40.0, label_smoothing=0.1, memory=memory)

        return gradients(losses, x, t)

    for a, b in zip(kept("auto"), kept(0), strict=True):
        assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())  # a product's rounding may depend on where it is put


@pytest.mark.parametrize("memory", [-1, 1.5, "all", True])
def test_bad_memory_is_named(memory):
    x, t = planted.pairs(4, 3)
    with pytest.raises(ValueError, match=f"memory is {memory!r}; expected 'auto' or a number of bytes"):
        rf.contrastive_loss(x, t, 10.0, memory=memory)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_in_the_features_reach_the_loss(bad, backend):
    x, t = (f.float() for f in planted.pairs(300, 16))
    x[7, 3] = bad
    for scale in (10.0, 100.0):
        each = rf.contrastive_loss(x, t, scale, reduction="none")
        assert not each[7].isfinite() and not rf.contrastive_loss(x, t, scale).isfinite()


def test_the_number_of_threads_may_change_between_forward_and_backward():
    x, t = (f.float().requires_grad_() for f in planted.pairs(700, 16))
    before = torch.get_num_threads()
    results = []
    try:
        for forward, backward in ((1, 1), (1, 5), (5, 1)):
            torch.set_num_threads(forward)
            loss = rf.contrastive_loss(x, t, 30.0)
            torch.set_num_threads(backward)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, t))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-8)
