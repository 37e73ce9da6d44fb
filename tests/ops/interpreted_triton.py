"""The Triton kernels' own tests, run by test_triton.py in a process under TRITON_INTERPRET=1.

What every body of the operators must do is in tests/test_contrastive.py, test_class_losses.py, test_scores.py and
test_risks.py; here is what only these can: panels and stretches of rows, 16-bit planes, rectangles, and the operators
as torch sees them.
"""

from __future__ import annotations

from functools import cache

import planted
import pytest
import torch
from targets import INTERPRETED, gradients

import robustft
from robustft import functional as rf
from robustft.ops import accelerator, dispatch, layouts, reference, registry
from robustft.ops.triton import configs

assert INTERPRETED and accelerator.STATUS == "registered"


def pairs(n: int, d: int, seed: int = 0):
    return [f.float() for f in planted.pairs(n, d, seed=seed)]


@pytest.fixture
def panels(monkeypatch):
    """Panels of 64 rows."""
    monkeypatch.setattr(configs, "PANEL_ROWS", 64)
    monkeypatch.setattr(configs, "PANEL_BYTES", 1)


def losses(n: int = 70, memory: str | int = "auto", s: float = 40.0):
    labels = torch.arange(n) // 2

    def function(x, t):
        teacher = (x.detach() + 0.01, t.detach(), 0.8 * s)
        terms = rf.contrastive_distillation_loss(x, t, s, *teacher, labels=labels, memory=memory)
        return *terms, rf.contrastive_loss(x, t, s, label_smoothing=0.1, memory=memory)

    with robustft.backend("triton"):
        return gradients(function, *pairs(n, 16))


@cache
def whole(s: float) -> list[torch.Tensor]:
    """The losses as the kernels are configured, to which those of other configurations are held: to be asked for
    before anything is changed."""
    return losses(s=s)


def test_panels_of_rows_add_up(request):
    expected = whole(40.0)
    request.getfixturevalue("panels")
    for memory in ("auto", 0):
        for a, b in zip(losses(memory=memory), expected, strict=True):
            assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())


@pytest.fixture
def library(panels, monkeypatch):
    """Products by the library, in pieces of a few tiles of 32 x 32."""
    monkeypatch.setattr(configs, "by_library", lambda *_: True)
    strips = {load: configs.Strip(32, 32, 2, of.warps) for load, of in configs.STRIPS.items()}
    monkeypatch.setattr(configs, "STRIPS", strips)
    monkeypatch.setattr(configs, "WEIGHTS", dict.fromkeys(configs.WEIGHTS, configs.Weights(32, 32, 2, 1)))
    monkeypatch.setattr(configs, "FORWARD_PIECE", configs.Sides(64, 64))
    monkeypatch.setattr(configs, "BACKWARD_PIECE", configs.Sides(64, 64))
    monkeypatch.setattr(configs, "WEIGHTS_BYTES", 64 * 64 * 2)  # of float16: pieces of 64 x 64, of float32 64 x 32


@pytest.mark.parametrize(("memory", "s"), [("auto", 40.0), (0, 100.0)])
def test_the_librarys_products_give_the_same_losses_and_gradients(s, memory, request):
    expected = whole(s)
    request.getfixturevalue("library")
    for a, b in zip(losses(memory=memory, s=s), expected, strict=True):
        assert (a - b).abs().max() <= 1e-7 * s * (1 + b.abs().max())


@pytest.mark.parametrize(("s", "st"), [(20.0, 30.0), (20.0, 400.0), (400.0, 20.0), (400.0, 300.0)])  # 400 is wide
@pytest.mark.parametrize("memory", ["auto", 0])
def test_a_teachers_strips_are_as_the_reference_whichever_of_both_is_wide(s, st, memory, library):
    (x, t), (xt, tt) = pairs(70, 16), pairs(70, 9, 1)

    def of_loss(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        def function(x, t, s):
            return rf.contrastive_distillation_loss(x, t, s, xt.to(dtype), tt.to(dtype), st, memory=memory)

        with robustft.backend(backend):
            return gradients(function, x.to(dtype), t.to(dtype), torch.tensor(s, dtype=dtype))

    torch.use_deterministic_algorithms(True)  # new memory is full of NaN: that beside a piece of S, too
    try:
        ours = of_loss(torch.float32, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(ours, of_loss(torch.float64, "reference"), strict=True):
        assert (a - b).abs().max() <= 1e-7 * max(s, st) * (1 + b.abs().max())


def of_float16(function, times: float, n: int, length: float = 1.0):
    """Gradients of `times` the sum of a function's losses for float16 features by Triton, and exact ones."""
    x, t = (f.half() * length for f in pairs(n, 16))

    def of_loss(x, t):
        leaves = [f.detach().requires_grad_() for f in (x, t)]
        return torch.autograd.grad(times * sum(loss.sum() for loss in function(*leaves)), leaves)

    with robustft.backend("triton"):
        ours = of_loss(x, t)
    with robustft.backend("reference"):
        exact = of_loss(x.double(), t.double())
    return zip(ours, exact, strict=True)


def has_its_digits(ours: torch.Tensor, exact: torch.Tensor) -> None:
    spacing = 2.0**-24  # of float16's smallest numbers, by half of which each of two gradients is off
    assert ((ours.double() - exact).abs() <= 1e-3 * exact.abs().max() + spacing).all()
    assert (ours.double() - exact).norm() <= 5e-4 * exact.norm() + spacing * exact.numel() ** 0.5


@pytest.mark.parametrize("times", [1e-4, 1.0, 300.0])  # G of at most 6e-8 without a unit, whose halves would be 0
@pytest.mark.parametrize("memory", ["auto", 0])
def test_float16_gradients_by_the_library_keep_their_digits_however_small_the_loss(memory, times, library):
    labels, (xt, tt) = torch.arange(70) // 2, [f.half() for f in pairs(70, 16, 1)]

    def function(x, t):
        how = {"labels": labels, "memory": memory}
        terms = rf.contrastive_distillation_loss(x, t, 40.0, xt.to(x.dtype), tt.to(x.dtype), 32.0, **how)
        return *terms, rf.contrastive_loss(x, t, 40.0, label_smoothing=0.1, memory=memory)

    for ours, exact in of_float16(function, times, 70):
        has_its_digits(ours, exact)


@pytest.mark.parametrize("times", [1e-4, 1.0, 300.0])  # G of at most 1e-8 without a unit
def test_float16_gradients_of_the_sigmoid_losses_keep_their_digits(times):
    labels, (xt, tt), s = torch.arange(40) // 2, [f.half() for f in pairs(40, 16, 1)], 20.0 / 64**2

    def function(x, t):
        teacher = xt.to(x.dtype), tt.to(x.dtype), 20.0, -3.0
        terms = rf.sigmoid_contrastive_distillation_loss(x, t, s, -5.0, *teacher, labels=labels)
        return *terms, rf.sigmoid_contrastive_loss(x, t, s, -5.0, labels=labels)

    for ours, exact in of_float16(function, times / 40, 40, 64.0):
        has_its_digits(ours, exact)


@pytest.mark.parametrize("s", [0.0, 1e-38])
def test_float16_gradients_of_the_sigmoid_loss_are_numbers_where_nothing_scales_them(s):
    def function(x, t):
        return [rf.sigmoid_contrastive_loss(x, t, s, -5.0, reduction="none")]

    for ours, exact in of_float16(function, 2.0**30, 40):
        assert not exact.abs().max() > 1e-25 and torch.equal(ours, torch.zeros_like(ours))


def sigmoid_losses(dtype: torch.dtype, memory: str | int = "auto"):
    labels, (xt, tt) = torch.arange(40) // 2, pairs(40, 9, 1)

    def function(x, t, s, b, w):
        how = {"labels": labels, "weight": w, "memory": memory}
        terms = rf.sigmoid_contrastive_distillation_loss(x, t, s, b, xt.to(dtype), tt.to(dtype), 20.0, -3.0, **how)
        return *terms, rf.sigmoid_contrastive_loss(x, t, s, b, **how)

    inputs = *pairs(40, 16), torch.tensor(20.0), torch.tensor(-5.0), torch.rand(40)
    with robustft.backend("triton"):
        return gradients(function, *(i.to(dtype) for i in inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pieces_of_the_sigmoid_losses_add_up(dtype, monkeypatch):
    torch.manual_seed(1)
    whole = sigmoid_losses(dtype)
    monkeypatch.setattr(configs, "BACKWARD_PIECE", configs.Sides(32, 24))
    unit = 2e-6 if dtype == torch.float32 else 2e-3  # of the gradients as rounded
    for memory in ("auto", 0):
        torch.manual_seed(1)
        for a, b in zip(sigmoid_losses(dtype, memory), whole, strict=True):
            assert (a - b).abs().max() <= unit * (1 + b.abs().max())


def class_losses(memory: str | int = "auto"):
    """Cross-entropy with the penalty, smoothed and biased, and both forms of dual risk, of 40 rows and 5 classes."""
    labels, core, bias = torch.arange(40) % 5, torch.rand(40, 5), torch.randn(5)

    def function(x, w, v, bias):
        terms = rf.classification_loss(x, w, labels, 20.0, bias=bias, label_smoothing=0.1, memory=memory)
        soft = rf.dual_risk(x, w, v, labels, core, 20.0, memory=memory)
        return *terms, *soft, *rf.dual_risk(x, w, v, labels, core[:, 0], 20.0, memory=memory)

    with robustft.backend("triton"):
        return gradients(function, pairs(40, 7)[0], *pairs(5, 7), bias)


def test_panels_and_stretches_of_rows_add_up_to_the_classes_gradients(monkeypatch):
    torch.manual_seed(1)
    whole = class_losses()
    monkeypatch.setattr(configs, "SPLIT_ROWS", 16)
    for memory in ("auto", 0):
        torch.manual_seed(1)
        for a, b in zip(class_losses(memory), whole, strict=True):
            assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())
        monkeypatch.setattr(configs, "PANEL_ROWS", 32)
        monkeypatch.setattr(configs, "PANEL_BYTES", 1)


def test_nothing_is_read_that_was_not_written():
    torch.manual_seed(1)
    expected = losses(35), class_losses(0), sigmoid_losses(torch.float32)
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN then
    try:
        assert torch.empty(9).isnan().all()
        torch.manual_seed(1)
        found = losses(35), class_losses(0), sigmoid_losses(torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(sum(found, []), sum(expected, []), strict=True):
        assert torch.equal(a, b)


def test_labels_that_are_no_class_make_their_own_losses_nan():
    x, w = pairs(40, 8)[0], pairs(5, 8)[0]
    labels = torch.arange(40) % 5
    labels[3], labels[7] = -1, 5
    cross_entropy, *_ = torch.ops.robustft.classification_loss(
        x, w, torch.tensor(9.0), None, labels, "softplus", False, 0.0, False
    )
    heads = (x, torch.cat((w, w)), torch.tensor(9.0), labels, torch.ones(40))
    empirical, *_ = torch.ops.robustft.dual_risk(*heads, False)
    for losses in (cross_entropy, empirical):
        assert losses.isnan().nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("s", [40.0, 400.0])  # 400: logits of a tile span several hundred
def test_planes_of_16_bits_cost_half_a_percent_of_the_gradient(s, monkeypatch):
    expected, *gradients = whole(s)
    monkeypatch.setitem(layouts.TRITON_KEPT, torch.float32, torch.bfloat16)
    value, *halves = losses(s=s)
    assert torch.equal(value, expected)
    for a, b in zip(halves, gradients, strict=True):  # the interpreter truncates, which doubles the error of rounding
        assert (a - b).norm() <= 5e-3 * b.norm()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize(
    ("products", "dtype"), [("panels", torch.float32), ("library", torch.float32), ("library", torch.float16)]
)
def test_rectangles_are_as_the_reference(keep, with_teacher, products, dtype, request):
    request.getfixturevalue(products)
    (x, t), (xt, tt) = ([f.to(dtype) for f in pairs(75, d, seed)] for d, seed in ((12, 0), (9, 1)))
    s, st = torch.tensor(30.0), torch.tensor(20.0)
    labels = torch.arange(75) % 7 * 10**11
    matrices = [x[:69], t, s, labels[:69], labels, *((xt[:69], tt, st) if with_teacher else (None,) * 3)]
    exact = [m.double() if m is not None and m.is_floating_point() else m for m in matrices]
    row, col, *kept = torch.ops.robustft.similarity_statistics(*matrices, True, keep, "highest")
    statistics = reference.similarity_statistics(*exact)
    for ours, theirs in zip((row, col), statistics, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    coefficients = [torch.rand(side.shape) for side in (row, col)]
    for c, side in zip(coefficients, (row, col), strict=True):
        for kind in (0, 1, 5, 6)[: len(side) // 2]:
            c[kind] = side[kind]
    gradient = torch.ops.robustft.similarity_gradient(*matrices, *coefficients, *kept, True, "highest")
    expected = reference.similarity_gradient(*exact, *(c.double() for c in coefficients))
    for ours, theirs in zip(gradient, expected, strict=True):
        assert (ours - theirs).abs().max() <= (3e-6 if dtype == torch.float32 else 1e-3) * theirs.abs().max()


@pytest.mark.parametrize("keep", [False, True])
def test_operators_pass_opcheck(keep):
    x, t = (f.requires_grad_() for f in pairs(9, 5))
    s = torch.tensor(7.0, requires_grad=True)
    losses, teacher = torch.ops.robustft, (*pairs(9, 6, 1), torch.tensor(5.0))
    # Not those that compare results twice computed: of what is kept, the rims are never written, or read.
    checks = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(losses.contrastive_loss.default, (x, t, s, torch.arange(9) // 2, 0.1, keep), **checks)
    torch.library.opcheck(losses.contrastive_distillation_loss.default, (x, t, s, *teacher, None, keep), **checks)
    numbers = s, torch.tensor(-2.0, requires_grad=True)
    weight = torch.rand(9, requires_grad=True) if keep else None
    torch.library.opcheck(
        losses.sigmoid_contrastive_loss.default,
        (x, t, *numbers, None, weight, "sum" if keep else "none", False),
        **checks,
    )
    of_teacher = *teacher, torch.tensor(-1.0), None
    pairs_of = losses.sigmoid_contrastive_distillation_loss.default
    torch.library.opcheck(pairs_of, (x, t, *numbers, *of_teacher, keep), **checks)
    labels, bias = torch.arange(9) % 4, torch.randn(4, requires_grad=True) if keep else None
    inputs = (x, t[:4], s, bias, labels, "softplus", not keep, 0.1, keep)
    torch.library.opcheck(losses.classification_loss.default, inputs, **checks)
    core = torch.rand(9, 4) if keep else torch.rand(9)
    torch.library.opcheck(losses.dual_risk.default, (x, t[:8], s, labels, core, keep), **checks)
    torch.library.opcheck(losses.concept_scores.default, (x.detach(), t[:4].detach(), 0.5, s.detach()), **checks)
    torch.library.opcheck(losses.misalignment_penalty.default, (x, labels, "ratio", keep), **checks)


def test_losses_compile_without_a_graph_break():
    x, t = (f.requires_grad_() for f in pairs(40, 8))
    labels = torch.arange(40) % 5

    def objective(x, t):
        terms = rf.contrastive_distillation_loss(x, t, 20.0, t, x, 9.0)
        of_classes = (
            rf.classification_loss(x, t[:5], labels, 20.0),
            rf.dual_risk(x, t[:5], t[5:10], labels, x[:, 0], 9.0),
        )
        heads = sum(sum(each) for each in of_classes) + rf.misalignment_penalty(x @ t[:5].T, labels)
        loss = terms.contrastive + 2 * terms.distillation + rf.contrastive_loss(x, t, 30.0, label_smoothing=0.1)
        return loss + heads

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, t), (x, t)) for f in (objective, compiled)]
    torch.testing.assert_close(*results)


def test_scale_of_zero_and_identical_rows_are_exact():
    x, t = pairs(40, 8)
    with robustft.backend("triton"):
        for a, b, s in ((x, t, 0.0), (x[:1].expand(40, 8), t[:1].expand(40, 8), 100.0)):
            each = rf.contrastive_loss(a, b, s, reduction="none")
            torch.testing.assert_close(each, torch.full((40,), 40.0).log(), rtol=1e-6, atol=0)


def test_float64_is_left_to_the_reference():
    x, t = planted.pairs(9, 5)
    assert registry.body("contrastive_loss", x.device, x.dtype) == "reference"
    with robustft.backend("triton"), pytest.raises(RuntimeError, match="no such kernel .* torch.float64"):
        rf.contrastive_loss(x, t, 10.0)
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="has no kernel of contrastive_loss for cpu tensors of torch.float64"):
        assert rf.contrastive_loss(x, t, 10.0).dtype == torch.float64
