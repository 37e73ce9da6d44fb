"""Losses on class logits and the misalignment penalty: exact values, signs, and the float64 reference.

What names a target is shared by the compiled CPU code, the Triton kernels in the interpreter and those on a GPU.
"""

from __future__ import annotations

import math
from functools import partial

import planted
import pytest
import torch
from targets import (
    assert_as_accurate_as_eager,
    case,
    each_body,
    each_device,
    each_target,
    exhaustive,
    gradients,
    placed,
    sizes,
)

import robustft
from robustft import functional as rf
from robustft.ops.arguments import VARIANTS

# N, K, D: below, at and above a panel's rows (128 here, or a quarter of N), a block of classes (256) and a vector.
SHAPES = sizes(
    [(1, 1, 1), (1, 2, 37), (7, 10, 128), (300, 1, 16), (300, 17, 16), (127, 257, 1), (513, 256, 37), (97, 255, 512)],
    [(1, 1, 1), (33, 17, 8), (3, 35, 9)],  # 17 classes with top1; of tiles of 32 x 32
)


def classes(n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features near their class's embedding, so that most samples are right and some wrong."""
    w, _ = planted.pairs(k, d)
    labels = torch.arange(n) % k
    x = torch.nn.functional.normalize(w[labels] + 1.5 * planted.pairs(n, d, seed=3)[0], dim=1)
    return x, w, labels


@each_target
@pytest.mark.parametrize("scale", sizes([1.0, *exhaustive(14.3), 100.0], [100.0]))
@pytest.mark.parametrize("variant", VARIANTS)
def test_classification_loss_is_as_accurate_as_eager(scale, target, variant):
    def loss(labels, top1, x, w, s, bias, weight):
        return rf.classification_loss(
            x, w, labels, s, bias=bias, variant=variant, top1=top1, label_smoothing=0.1, weight=weight
        )

    for n, k, d in SHAPES:
        with case(n, k, d):
            x, w, labels = classes(n, k, d)
            inputs = (x, w, torch.tensor(scale), 0.1 * torch.randn(k), torch.rand(n))
            assert_as_accurate_as_eager(partial(loss, labels.to(target.device), k == 17), *inputs, target=target)


@each_target
@pytest.mark.parametrize("soft", [False, True])
def test_dual_risk_is_as_accurate_as_eager(soft, target):
    def risks(labels, core, x, w, v, s, weight):
        return rf.dual_risk(x, w, v, labels, core.to(x.dtype), s, weight=weight)

    for n, k, d in SHAPES:
        with case(n, k, d):
            x, w, labels = classes(n, k, d)
            labels, core = placed(target, labels, torch.rand(n, k) if soft else torch.rand(n))
            inputs = (x, w, planted.pairs(k, d, seed=9)[0], torch.tensor(20.0), torch.rand(n))
            assert_as_accurate_as_eager(partial(risks, labels, core), *inputs, target=target)


@each_target
@pytest.mark.parametrize("top1", [False, True])
def test_hard_label_losses_are_never_negative(top1, target):
    n, k, d = sizes([(512, 100, 64)], [(33, 17, 9)])[0]
    w, labels = planted.pairs(k, d)[0], torch.arange(n) % k
    x, w, labels = placed(target, w[labels] + 0.01 * planted.pairs(n, d)[0], w, labels)
    with robustft.backend(target.backend):
        terms = rf.classification_loss(x, w, labels, 100.0, top1=top1, reduction="none")
        risks = rf.dual_risk(x, w, w.flip(0), labels, torch.ones(n, device=target.device), 100.0, reduction="none")
    assert all((term >= 0).all() for term in (*terms, *risks))


@each_device
def test_recomputing_equals_keeping(target):
    n, k = sizes([(300, 40)], [(33, 5)])[0]
    x, w, s, labels, core = placed(
        target, *classes(n, k, 16)[:2], torch.tensor(30.0), torch.arange(n) % k, torch.rand(n, k)
    )

    def loss(x, w, s, memory):
        classes = rf.classification_loss(x, w, labels, s, memory=memory)
        return *classes, *rf.dual_risk(x, w, w.flip(0), labels, core, s, memory=memory)

    with robustft.backend(target.backend):
        kept, recomputed = (gradients(partial(loss, memory=memory), x, w, s) for memory in ("auto", 0))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def everything(x, w, v, labels, core, s, bias):
    """All terms and gradients of both losses, with every statistic in use."""
    leaves = [a.detach().requires_grad_() for a in (x, w, v, s, bias)]
    x, w, v, s, bias = leaves
    terms = rf.classification_loss(x, w, labels, s, bias=bias, label_smoothing=0.1)
    terms += rf.dual_risk(x, w, v, labels, core, s) + rf.dual_risk(x, w, v, labels, core[:, 0], s, memory=0)
    return [*terms, *torch.autograd.grad(sum((i + 1) * term for i, term in enumerate(terms)), leaves)]


def everything_inputs(n: int, k: int, d: int, dtype: torch.dtype = torch.float32):
    x, w, labels = classes(n, k, d)
    tensors = (x, w, w.flip(0), torch.rand(n, k), torch.tensor(30.0), torch.randn(k))
    x, w, v, core, s, bias = (a.to(dtype) for a in tensors)
    return x, w, v, labels, core, s, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_result(dtype):
    before = torch.get_num_threads()
    for n, k, d in [(1, 3, 64), (40, 7, 64), (700, 300, 64), (900, 5, 16), (300, 40, 512)]:
        with case(n, k, d):
            inputs, results = everything_inputs(n, k, d, dtype), []
            try:
                for threads in (1, 2, 3, 1):
                    torch.set_num_threads(threads)
                    results.append(everything(*inputs))
            finally:
                torch.set_num_threads(before)
            for threads, other in zip((2, 3, 1), results[1:], strict=True):
                for a, b in zip(results[0], other, strict=True):
                    # Bit by bit up to two threads, but for products so small that aten, not robustft, decides about
                    # threads. More get smaller panels, and aten's products round by their shape.
                    rounding = 1e-6 if dtype == torch.float32 else 2**-7
                    same = n * k * d > 1e6 and threads < 3
                    assert torch.equal(a, b) if same else (a - b).abs().max() <= rounding * (1 + b.abs().max())


@each_device
def test_memory_around_the_inputs_is_never_read(target):
    inputs = placed(target, *everything_inputs(*sizes([(131, 67, 37)], [(7, 5, 3)])[0]))

    def poisoned(a):
        if a.dim() == 0:
            return a
        wider = [size + 64 for size in a.shape]
        around = torch.full(wider, torch.nan if a.is_floating_point() else -1, device=a.device).to(a.dtype)
        inside = around[tuple(slice(32, -32) for _ in wider)]
        inside.copy_(a)
        return inside

    with robustft.backend(target.backend):
        for a, b in zip(everything(*map(poisoned, inputs)), everything(*inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_body
@pytest.mark.parametrize("layout", sizes(["transposed", "strided", "expanded"], ["strided"]))
def test_any_strides_give_the_same_losses_and_gradients(layout, target):
    x, w, v, labels, core, s, bias = placed(target, *everything_inputs(*sizes([(70, 20, 24)], [(7, 5, 8)])[0]))

    def laid_out(a):
        match layout:
            case "transposed":
                return a.T.contiguous().T if a.dim() == 2 else a
            case "strided":
                return torch.stack((a, a), -1).flatten(-2)[..., ::2]
        return a[:1].expand_as(a)

    changed = [a if a.dim() == 0 else laid_out(a) for a in (x, w, v, core, bias)]
    with robustft.backend(target.backend):
        x, w, v, core, bias = (a.contiguous() for a in changed)
        expected = everything(x, w, v, labels, core, s, bias)
        x, w, v, core, bias = changed
        for a, b in zip(everything(x, w, v, labels, core, s, bias), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@each_target
def test_gradient_errors_are_small_against_the_gradients_themselves(target):
    inputs = placed(target, *everything_inputs(*sizes([(257, 100, 37)], [(33, 34, 9)])[0]))
    with robustft.backend("reference"):
        exact = everything(*(a.double() if a.is_floating_point() else a for a in inputs))
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5}.get(target.dtype, 1e-2)
    with robustft.backend(target.backend):
        for a, b in zip(everything(*inputs), exact, strict=True):
            assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.fixture(params=sizes([("high", 1e-4), ("medium", 3e-2)], [("high", 1e-4)]), ids=str)
def precision(request):
    """A float32 precision and the error that it may cause, relative to the norm, at logits of scale 30."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param[0])
    yield request.param
    torch.set_float32_matmul_precision(before)


@each_device
def test_float32_precision_is_what_torch_was_told(precision, target):
    inputs = placed(target, *everything_inputs(*sizes([(257, 100, 128)], [(7, 5, 3)])[0]))
    with robustft.backend("reference"):
        exact = everything(*(a.double() if a.is_floating_point() else a for a in inputs))
    with robustft.backend(target.backend):
        for a, b in zip(everything(*inputs), exact, strict=True):
            assert (a.double() - b).norm() <= precision[1] * b.norm() + 1e-6


@pytest.mark.parametrize("loss", ["classification", "dual"])
def test_memory_decides_what_is_kept(loss):
    n, k, d = 400, 500, 8
    x, w, labels = classes(n, k, d)
    x, w = x.float().requires_grad_(), w.float()
    size = n * k * 4 * (2 if loss == "dual" else 1)

    def largest_kept(memory):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a.numel() * a.element_size()), lambda a: a):
            if loss == "dual":
                rf.dual_risk(x, w, w, labels, torch.ones(n), 10.0, memory=memory)
            else:
                rf.classification_loss(x, w, labels, 10.0, memory=memory)
        return max(kept)

    assert largest_kept("auto") == largest_kept(size) == size
    assert largest_kept(size - 1) < size / 10
    with pytest.raises(ValueError, match="memory is 'all'"):
        largest_kept("all")


@each_device
def test_repeating_a_computation_repeats_its_bits(target):
    inputs = placed(target, *everything_inputs(*sizes([(700, 300, 64)], [(7, 5, 3)])[0]))
    with robustft.backend(target.backend):
        assert all(torch.equal(a, b) for a, b in zip(everything(*inputs), everything(*inputs), strict=True))


@each_body
@pytest.mark.parametrize("top1", [False, True])
def test_nan_in_a_feature_reaches_its_own_loss_only(top1, target):
    n = sizes([300], [34])[0]
    x, w, labels = placed(target, *classes(n, 40, 16))
    x[n - 30, 3] = torch.nan
    core = torch.ones(n, 40, device=target.device, dtype=target.dtype)
    with robustft.backend(target.backend):
        terms = (
            *rf.classification_loss(x, w, labels, 10.0, top1=top1, reduction="none"),
            *rf.dual_risk(x, w, w, labels, core, 10.0, reduction="none"),
        )
    for each in terms:
        assert each.isnan().nonzero().tolist() == [[n - 30]]


@each_body
@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_nan_in_a_class_reaches_both_terms_of_every_sample(k, top1, target):
    x, w, labels = placed(target, *classes(9, k, 6))
    w[k - 1, 2] = torch.nan
    core = torch.zeros(9, k, device=target.device, dtype=target.dtype)
    with robustft.backend(target.backend):
        for variant in VARIANTS:
            terms = rf.classification_loss(x, w, labels, 10.0, variant=variant, top1=top1, reduction="none")
            assert all(term.isnan().all() for term in terms), variant
        empirical, worst_case = rf.dual_risk(x, w.nan_to_num(), w, labels, core, 10.0, reduction="none")
    assert worst_case.isnan().all() and empirical.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_pass_gradcheck(variant):
    x, w, labels = classes(9, 5, 4)
    leaves = [a.requires_grad_() for a in (x, w, torch.tensor(8.0).double(), torch.randn(5).double())]

    def loss(x, w, s, bias):
        terms = rf.classification_loss(x, w, labels, s, bias=bias, variant=variant, reduction="none")
        return *terms, *rf.dual_risk(x, w, w.flip(0), labels, torch.ones(9, 5).double() / 3, s, reduction="none")

    assert torch.autograd.gradcheck(loss, leaves)


@each_body
def test_released_ratio_is_stable_at_a_wrong_answer(target):
    # Two classes, weight 1: p_true = (3 - sqrt 5) / 2 is where CE + R is stationary (methods.md, section 5).
    p = (3 - math.sqrt(5)) / 2
    z, identity, labels = placed(
        target, torch.tensor([[math.log(p), math.log(1 - p)]]), torch.eye(2), torch.tensor([0])
    )
    with robustft.backend(target.backend):
        sum(rf.classification_loss(z.requires_grad_(), identity, labels, 1.0, variant="ratio")).backward()
    assert p == pytest.approx(0.381966, abs=1e-6) and z.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("variant", "sign"), [("neg_log_ratio", -1), ("neg_ratio", -1), ("softplus", -1), ("ratio", 1)]
)
@pytest.mark.parametrize("top1", [False, True])
@each_body
def test_sign_of_the_gradient_on_the_true_logit(variant, sign, top1, target):
    z, identity, labels = placed(target, torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.eye(4), torch.tensor([0]))
    with robustft.backend(target.backend):
        value = rf.classification_loss(z.requires_grad_(), identity, labels, 1.0, variant=variant, top1=top1)
        (grad,) = torch.autograd.grad(value.misalignment, z)
    assert grad[0, 0].sign() == sign and grad.sum().abs() < 1e-6
    assert grad[0, 3] == 0  # below the label: not in H
    assert (grad[0, 1] == 0) == top1


@each_body
def test_default_penalty_by_hand(target):
    z, identity, labels = placed(target, torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.eye(4), torch.tensor([0]))
    expected = math.log(math.exp(2) + math.exp(3)) - 1
    with robustft.backend(target.backend):
        assert rf.misalignment_penalty(z, labels).item() == pytest.approx(expected)
        fused = rf.classification_loss(z, identity, labels, 1.0)
        assert fused.misalignment.item() == pytest.approx(expected)
        assert rf.misalignment_penalty(z, labels, top1=True).item() == pytest.approx(2.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top1", [False, True])
@each_body
def test_correct_rows_have_no_penalty_and_no_gradient(variant, top1, target):
    x, w, _ = placed(target, *classes(30, 10, 32))
    labels = (x @ w.T).argmax(1)
    x.requires_grad_()
    with robustft.backend(target.backend):
        terms = rf.classification_loss(x, w, labels, 100.0, variant=variant, top1=top1, reduction="none")
        (grad,) = torch.autograd.grad(terms.misalignment.sum(), x)
    assert torch.equal(terms.misalignment, torch.zeros_like(terms.misalignment))
    assert torch.equal(grad, torch.zeros_like(x))


# Shapes at which a BLAS rounds equal columns differently, in one dtype or another.
DUPLICATED = sizes(
    [(200, 7, 64), (200, 40, 64), (40, 1000, 64), (65, 101, 37), (5, 5, 7), (17, 13, 768)], [(20, 20, 64)]
)


@each_target
@pytest.mark.parametrize("top1", [False, True])
def test_duplicate_class_names_are_ties_not_errors(top1, target, placeless_products):
    for n, k, d in DUPLICATED:
        with case(n, k, d), robustft.backend(target.backend):
            x, w, _ = placed(target, *classes(n, k, d))
            twice = torch.cat((w, w))
            labels = (x.double() @ w.double().T).argmax(1)
            for label in (labels, labels + k):
                terms = rf.classification_loss(x, twice, label, 100.0, top1=top1, reduction="none")
                assert torch.equal(terms.misalignment, torch.zeros_like(terms.misalignment))


@each_target
@pytest.mark.parametrize("memory", ["auto", 0])
def test_a_duplicate_of_the_label_gets_no_gradient(memory, target, placeless_products):
    for n, k, d in DUPLICATED:
        with case(n, k, d), robustft.backend(target.backend):
            x, w, bias = placed(target, *classes(n, k, d)[:2], torch.randn(k))
            twice = torch.cat((w, w)).requires_grad_()
            for label, duplicate in ((0, k), (k, 0)):
                labels = torch.full((n,), label, device=x.device)
                terms = rf.classification_loss(x, twice, labels, 100.0, bias=torch.cat((bias, bias)), memory=memory)
                (grad,) = torch.autograd.grad(terms.misalignment, twice)
                assert terms.misalignment > 0 and not grad[duplicate].any()


def test_penalty_averages_over_the_batch_or_the_errors():
    z = torch.tensor([[1.0, 2.0], [5.0, 0.0], [0.0, 3.0]])
    labels = torch.zeros(3, dtype=torch.int64)
    assert rf.misalignment_penalty(z, labels).item() == pytest.approx(4 / 3)
    assert rf.misalignment_penalty(z, labels, average="errors").item() == pytest.approx(2.0)
    assert rf.misalignment_penalty(z[1:2], labels[:1], average="errors") == 0


@each_body
def test_one_class_has_no_loss(target):
    x, w, labels = placed(target, torch.randn(5, 3), torch.randn(1, 3), torch.zeros(5, dtype=torch.int64))
    with robustft.backend(target.backend):
        terms = rf.classification_loss(x, w, labels, 10.0)
    assert terms.cross_entropy == 0 and terms.misalignment == 0


@each_body
def test_soft_labels_that_are_one_hot_are_the_labels(target):
    x, w, labels = placed(target, *classes(50, 6, 8))
    one_hot = torch.nn.functional.one_hot(labels, 6).to(target.dtype)
    with robustft.backend(target.backend):
        risks = rf.dual_risk(x, w, w, labels, one_hot, 20.0)
        confident = rf.dual_risk(x, w, w, labels, torch.ones_like(labels, dtype=target.dtype), 20.0)
    for risk in (risks.worst_case, confident.worst_case):
        torch.testing.assert_close(risk, risks.empirical)


def test_cvar_of_known_losses():
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert rf.cvar(losses, 1.0).item() == pytest.approx(2.5)
    assert rf.cvar(losses, 0.5).item() == pytest.approx(3.5)
    assert rf.cvar(losses, 1e-6).item() == pytest.approx(4.0)
    value = rf.cvar(losses, 0.375)  # 1.5 samples: 4 and half of 3
    assert value.item() == pytest.approx(5.5 / 1.5)
    value.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.0, 1 / 1.5, 0.0, 0.5 / 1.5], dtype=torch.float64))


def test_cvar_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda losses: rf.cvar(losses, 0.3), torch.rand(11).double().requires_grad_())


X, W = torch.randn(4, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"class_embeddings": W[:, :2]}, ValueError, "class_embeddings has 2 dimensions; expected 3"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, ValueError, r"labels holds 0..5; expected values in \[0, 5\)"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, ValueError, "labels holds -1..2"),
        ({"labels": torch.rand(4)}, TypeError, "labels is torch.float32"),
        ({"bias": torch.ones(4)}, ValueError, r"bias is \(4,\)"),
        ({"variant": "log"}, ValueError, "variant is 'log'; expected one of neg_log_ratio"),
        ({"features": X[:0], "labels": torch.ones(0).long()}, ValueError, r"features has shape \(0, 3\)"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"features": X, "class_embeddings": W, "labels": torch.tensor([0, 1, 2, 3]), "logit_scale": 10.0}
    with pytest.raises(error, match=message):
        rf.classification_loss(**(arguments | change))


def test_bad_core_labels_and_alpha_are_named():
    labels = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"core_labels is \(4, 4\)"):
        rf.dual_risk(X, W, W, labels, torch.rand(4, 4), 10.0)
    with pytest.raises(ValueError, match="core_embeddings has 2 rows; expected 5"):
        rf.dual_risk(X, W, W[:2], labels, torch.rand(4), 10.0)
    with pytest.raises(ValueError, match="alpha is 0"):
        rf.cvar(torch.ones(3), 0)
