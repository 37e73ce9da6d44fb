"""The contrastive losses of every body against the float64 reference, and their properties.

One suite for the compiled CPU code, the Triton kernels in the interpreter and those on a GPU: see targets.py.
"""

from __future__ import annotations

from functools import partial

import planted
import pytest
import torch
from targets import assert_as_accurate_as_eager, case, each_device, each_target, exhaustive, gradients, sizes
from torch import Tensor

import robustft
from robustft import functional as rf

# Below, at and above a tile's sides.
SHAPES = sizes(
    [(1, 1), (2, 37), (7, 128), (255, 37), (256, 16), (257, 16), (1031, 37)],
    [(1, 1), (2, 37), (32, 16), (35, 20)],
)
SCALES = sizes([1.0, *exhaustive(14.3), 100.0], [1.0, 100.0])


@each_target
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("variant", ["plain", "labels", "smoothing"])
def test_contrastive_loss_is_as_accurate_as_eager(scale, target, variant):
    smoothing = 0.1 if variant == "smoothing" else 0.0

    def loss(labels, x, t, s, w):
        return rf.contrastive_loss(x, t, s, labels=labels, label_smoothing=smoothing, weight=w)

    for n, d in SHAPES:
        with case(n, d):
            labels = torch.randint(0, max(1, n // 4), (n,)).to(target.device) if variant != "plain" else None
            inputs = (*planted.pairs(n, d), torch.tensor(scale), torch.rand(n))
            assert_as_accurate_as_eager(partial(loss, labels), *inputs, target=target)


@each_target
@pytest.mark.parametrize("scale", SCALES)
def test_distillation_loss_is_as_accurate_as_eager(scale, target):
    def loss(labels, xt, tt, x, t, s, w):
        teacher = (xt.to(x.dtype), tt.to(x.dtype), 0.7 * scale)
        return rf.contrastive_distillation_loss(x, t, s, *teacher, labels=labels, weight=w)

    for n, d in SHAPES:
        with case(n, d):
            labels = torch.randint(0, max(1, n // 2), (n,)).to(target.device)
            teacher = (f.to(target.device, target.dtype) for f in planted.pairs(n, d + 3, seed=1))
            inputs = (*planted.pairs(n, d), torch.tensor(scale), torch.rand(n))
            assert_as_accurate_as_eager(partial(loss, labels, *teacher), *inputs, target=target)


def wide_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Pairs among which cosines reach from -1 to 1, so that logits of scale 100 span 200."""
    x, t = planted.pairs(n, 24)
    x[1::7], t[1::7] = -x[::7][: len(x[1::7])], -t[::7][: len(t[1::7])]
    return x, t


@each_target
@pytest.mark.parametrize("memory", ["auto", 0])
@pytest.mark.parametrize("n", sizes([50, 700], [50]))
def test_tiles_too_wide_for_one_exponential_are_as_accurate(n, memory, target):
    xt, tt = (f.to(target.device, target.dtype) for f in wide_pairs(n))

    def losses(x, t, s):
        teacher = (xt.to(x.dtype), tt.to(x.dtype), 90.0)
        return rf.contrastive_distillation_loss(x, t, s, *teacher, memory=memory)

    s = torch.tensor(100.0 if target.dtype != torch.float64 else 900.0)
    x, t = (f.to(target.device, target.dtype) for f in wide_pairs(n))
    index = torch.arange(n, device=target.device)
    with robustft.backend(target.backend):
        arguments = (x, t, s.to(target.device), index, index, None, None, None, False, True, "highest")
        records = torch.ops.robustft.similarity_statistics(*arguments)[2]
    # They are that wide: a centre that is none, or a step between stored similarities.
    assert records[1::2].any() if target.by_triton else records.isnan().any()
    assert_as_accurate_as_eager(losses, *wide_pairs(n), s, target=target)


@each_device
@pytest.mark.parametrize("n", sizes([9, 300, 2100], [9, 35]))
def test_keeping_exponentials_equals_computing_them_again(n, target):
    x, t = (f.to(target.device, torch.float32) for f in planted.pairs(n, 16))
    labels = torch.arange(n, device=target.device) // 2

    def kept(memory):
        def losses(x, t):
            teacher = (x.detach() + 0.01, t.detach(), 25.0)
            terms = rf.contrastive_distillation_loss(x, t, 40.0, *teacher, labels=labels, memory=memory)
            return *terms, rf.contrastive_loss(x, t, 40.0, label_smoothing=0.1, memory=memory)

        with robustft.backend(target.backend):
            return gradients(losses, x, t)

    for a, b in zip(kept("auto"), kept(0), strict=True):
        assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())  # a product's rounding may depend on where it is put


@each_target
def test_hard_label_loss_is_never_negative(target):
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(*sizes([(512, 64)], [(35, 64)])[0], noise=0.01))
    labels = torch.arange(len(x), device=target.device) + 10**12
    with robustft.backend(target.backend):
        each = rf.contrastive_loss(x, t, 100.0, reduction="none")
        assert (each >= 0).all()
        # The smallest are those where p is near 1: there float32 must still tell them apart from 0.
        assert torch.equal(each, rf.contrastive_loss(x, t, 100.0, labels=labels, reduction="none"))


@each_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_in_the_features_reach_the_loss(bad, target):
    n = sizes([300], [35])[0]
    x, t = (f.to(target.device, torch.float32) for f in planted.pairs(n, 16))
    x[7, 3] = bad
    with robustft.backend(target.backend):
        for scale in (10.0, 100.0):
            each = rf.contrastive_loss(x, t, scale, reduction="none")
            assert not each[7].isfinite() and not rf.contrastive_loss(x, t, scale).isfinite()


@each_device
def test_repeating_a_computation_repeats_its_bits(target):
    x, t = (f.to(target.device, torch.float32) for f in planted.pairs(sizes([700], [35])[0], 64))
    with robustft.backend(target.backend):
        first, second = (gradients(lambda x, t: rf.contrastive_loss(x, t, 50.0), x, t) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_device
@pytest.mark.parametrize(
    "layout",
    sizes(["transposed", "strided", "expanded", "misaligned", "surrounded by NaN"], ["strided", "surrounded by NaN"]),
)
def test_any_strides_give_the_same_loss_and_gradients(layout, target):
    n = sizes([70], [35])[0]
    x, t = (f.to(target.device, torch.float32) for f in planted.pairs(n, 24))
    match layout:
        case "transposed":
            other = x.T.contiguous().T
        case "strided":
            other = torch.stack((x, x), 2).reshape(n, 48)[:, ::2]
        case "expanded":
            x = x[:1].expand(n, 24)
            other = x.contiguous()
        case "misaligned":
            other = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(n, 24)
        case _:
            other = torch.nn.functional.pad(x, (3, 5, 2, 9), value=torch.nan)[2:-9, 3:-5]
    results = []
    with robustft.backend(target.backend):
        for version in (x, other):
            leaf = version.detach().requires_grad_()
            value = rf.contrastive_loss(leaf, t, 20.0)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


@each_target
@pytest.mark.parametrize("size", sizes([(1031, 37), (256, 16)], [(35, 37)]))
def test_gradient_errors_are_small_against_the_gradients_themselves(size, target):
    # At s = 100 most gradients are far below 1: a bound in absolute terms would let a wrong kernel pass.
    x, t = (f.to(target.device, target.dtype) for f in planted.pairs(*size, noise=2.0))

    def loss(x, t, s):
        terms = rf.contrastive_distillation_loss(x, t, s, t.detach(), x.detach(), 20.0)
        return terms.contrastive + terms.distillation

    with robustft.backend(target.backend):
        ours = gradients(loss, x, t, torch.tensor(50.0, device=target.device))
    with robustft.backend("reference"):
        exact = gradients(loss, x.double(), t.double(), torch.tensor(50.0, dtype=torch.float64, device=target.device))
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5}.get(target.dtype, 1e-2)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@each_device
def test_gradients_of_single_losses_and_of_none_are_right(target):
    # What autograd hands a backward: expanded, strided, or, of a loss that nothing depends on, zeros.
    x, t = (f.to(target.device, torch.float32).requires_grad_() for f in planted.pairs(40, 12))
    teacher = [f.detach() + 0.01 for f in (x, t)]

    def values():
        terms = rf.contrastive_distillation_loss(x, t, 20.0, *teacher, 9.0, reduction="none")
        picked = (terms.contrastive[3] + 2 * terms.distillation[::2].sum(), terms.distillation.sum())
        return [g for value in picked for g in torch.autograd.grad(value, (x, t), retain_graph=True)]

    with robustft.backend(target.backend):
        ours = values()
    with robustft.backend("reference"):
        for a, b in zip(ours, values(), strict=True):
            assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())
