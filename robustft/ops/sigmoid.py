"""The sigmoid losses over the similarity tiles (csrc/cpu/similarity/sigmoid.cpp, triton/sigmoid.py).

Every pair of an image and a text is a decision of its own: with z = s x t^T + b, y = 1 where the labels are the same,
else -1, and the teacher's logits zt

    contrastive_i  = sum_j softplus(-y_ij z_ij)                      G = sigmoid(z) - [same label]
    distillation_i = sum_j softplus(z_ij) - sigmoid(zt_ij) z_ij      H = sigmoid(z) - sigmoid(zt)

    dx = s (g G + h H) t,   dt = s (g G + h H)^T x,   ds = sum_i g_i (sum_j G_ij S_ij) + ...,   db likewise of G alone

with gradients g and h of the images' losses. A row's gradient needs nothing but its own pairs, so one sweep computes
losses and, for given g, gradients: for a total of the losses, whose g is known up to a factor, in the forward already.
Of single losses, and of two terms, only the backward knows g and h, and sweeps again, with S multiplied again or kept.
The gradients themselves cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops import arguments, reference, registry
from robustft.ops.dispatch import body_of
from robustft.ops.registry import (
    Backward,
    Call,
    Op,
    Source,
    accumulation_dtype,
    both,
    call,
    contiguous_like,
    gradient,
    reduced,
    register,
    setup_two_losses,
)


class Matrices(NamedTuple):
    """The factors of S (n, m), and of the teacher's if there is one, each with its scale and bias."""

    x: Tensor
    t: Tensor
    scale: Tensor
    bias: Tensor
    x_teacher: Tensor | None = None
    t_teacher: Tensor | None = None
    teacher_scale: Tensor | None = None
    teacher_bias: Tensor | None = None


def contrastive_loss(
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    memory: str | int,
) -> Tensor:
    """Of the per-sample losses, (n,), what `registry.reduced` gives."""
    if body_of("sigmoid_contrastive_loss", x) == "reference":
        same = indices(labels, len(x), x.device)
        losses = reference.sigmoid_contrastive_loss(x, t, scale, bias, same, same)
    elif reduction != "none" and in_forward(memory, x, t):
        return call("sigmoid_contrastive_loss", x, t, scale, bias, labels, weight, reduction, False)[0]
    else:
        keep = keeps(memory, x, t, 1)
        losses = call("sigmoid_contrastive_loss", x, t, scale, bias, labels, None, "none", keep)[0]
    return reduced(losses, weight, reduction)


def contrastive_distillation_loss(
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    xt: Tensor,
    tt: Tensor,
    st: Tensor,
    bt: Tensor,
    labels: Tensor | None,
    memory: str | int,
) -> tuple[Tensor, Tensor]:
    """Two (n,): contrastive and distillation."""
    name = "sigmoid_contrastive_distillation_loss"
    if body_of(name, x) == "reference":
        same = indices(labels, len(x), x.device)
        contrastive = reference.sigmoid_contrastive_loss(x, t, scale, bias, same, same)
        return contrastive, reference.sigmoid_distillation_loss(x, t, scale, bias, xt, tt, st, bt)
    contrastive, distillation = call(name, x, t, scale, bias, xt, tt, st, bt, labels, keeps(memory, x, t, 2))
    return contrastive, distillation


def in_forward(memory: str | int, x: Tensor, t: Tensor, ranks: int = 1) -> bool:
    """Whether the gradients of x and of all ranks' t, which will be asked for, may be kept until they are."""
    return _fits(memory, x, t, x.numel() + ranks * t.numel())


def keeps(memory: str | int, x: Tensor, t: Tensor, heads: int, ranks: int = 1) -> bool:
    """Whether the similarities of x and all ranks' t, which the backward needs, may be kept until then."""
    return _fits(memory, x, t, heads * x.shape[0] * ranks * t.shape[0])


def _fits(memory: str | int, x: Tensor, t: Tensor, numbers: int) -> bool:
    wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
    return wanted and numbers * accumulation_dtype(x.dtype).itemsize <= arguments.memory_budget(memory, x.device)


def indices(labels: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Labels, on the CPU renumbered from 0, since its kernels compare 32 bits."""
    if labels is None:
        return torch.arange(n, device=device)
    return torch.unique(labels, return_inverse=True)[1] if device.type == "cpu" else labels


def sweep(
    of: Matrices,
    x_labels: Tensor,
    t_labels: Tensor,
    weight: Tensor | None = None,
    similarities: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sums, dx, dt and kept:

    sums, (3, n): the rows' losses and their derivatives by the scale and the bias, with a teacher (6, n), as
    sigmoid_sum in csrc/cpu/similarity/sigmoid.h says.
    dx (n, d) and dt (m, d) in the sums' dtype, by the weights (1, n), with a teacher (2, n), of the rows' losses; empty
    without weights.
    kept, (n, m), with a teacher (2 n, m): S, empty unless it is to be kept; `similarities` of a later sweep.
    """
    x, t, scale, bias, *teacher = of
    precision = torch.get_float32_matmul_precision()
    weight = None if weight is None else weight.to(accumulation_dtype(x.dtype))
    how = weight, None if similarities is None or len(similarities) == 0 else similarities, keep, precision
    return torch.ops.robustft.sigmoid_sweep(x, t, scale, bias, x_labels, t_labels, *teacher, *how)


def by_numbers(rows: Tensor, sums: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """ds and db, from the gradients by the losses (1, n), with a teacher (2, n), and the sums (3, n) or (6, n)."""
    _, ds, db = (sums.view(len(rows), 3, -1) * rows[:, None]).sum((0, 2))
    return ds.to(scale.dtype, copy=True), db.to(bias.dtype, copy=True)  # results of an operator share no memory


def _contrastive_loss(x, t, scale, bias, labels, weight, reduction, keep):
    if _compiled_whole(x, weight, reduction):
        precision = torch.get_float32_matmul_precision()
        return torch.ops.robustft.sigmoid_totals(x, t, scale, bias, labels, reduction == "mean", precision)
    same = indices(labels, len(x), x.device)
    rows = None if reduction == "none" else unit_gradient(x, weight)
    sums, *kept = sweep(Matrices(x, t, scale, bias), same, same, rows, keep=keep)
    losses = sums[0]
    return losses.clone() if reduction == "none" else reduced(losses, weight, reduction), sums, *kept


def _compiled_whole(x: Tensor, weight: Tensor | None, reduction: str) -> bool:
    """Whether sigmoid_totals computes the loss, and sigmoid_scaled its gradient."""
    by = registry.BODIES.get(("sigmoid_totals", x.device.type)), registry.body("sigmoid_sweep", x.device, x.dtype)
    return reduction != "none" and weight is None and by == ("compiled", "compiled")


def unit_gradient(x: Tensor, weight: Tensor | None) -> Tensor:
    """(1, n), by the losses, where that by their total is 1."""
    return x.new_ones(1, x.shape[0], dtype=accumulation_dtype(x.dtype)) if weight is None else weight[None]


def row_gradient(grad: Tensor, weight: Tensor | None, n: int) -> Tensor:
    """(1, n), by the losses, of the total's."""
    if weight is None:
        return grad.expand(1, n)
    return (grad * weight.to(torch.promote_types(grad.dtype, weight.dtype)))[None]  # a 0-d factor does not promote


def _contrastive_gradient(grad, x, t, scale, bias, labels, weight, reduction, sums, kept_dx, kept_dt, kept):
    if _compiled_whole(x, weight, reduction):
        numbers = scale, bias, sums, kept_dx, kept_dt, reduction == "mean"
        return *torch.ops.robustft.sigmoid_scaled(grad, x, t, *numbers), x.new_empty(0)
    if reduction != "none":
        grad = grad / len(x) if reduction == "mean" else grad
        dx, dt = kept_dx * grad, kept_dt * grad
        rows = row_gradient(grad, weight, len(x))
    else:
        same, rows = indices(labels, len(x), x.device), grad[None]
        _, dx, dt, _ = sweep(Matrices(x, t, scale, bias), same, same, rows, kept)
    dweight = x.new_empty(0) if weight is None else (grad * sums[0]).to(weight.dtype)
    return dx.to(x.dtype), dt.to(t.dtype), *by_numbers(rows, sums, scale, bias), dweight


def _contrastive_distillation_loss(x, t, scale, bias, xt, tt, st, bt, labels, keep):
    same = indices(labels, len(x), x.device)
    sums, _, _, kept = sweep(Matrices(x, t, scale, bias, xt, tt, st, bt), same, same, keep=keep)
    return sums[0].clone(), sums[3].clone(), sums, kept


def _contrastive_distillation_gradient(g, h, x, t, scale, bias, xt, tt, st, bt, labels, sums, kept):
    same, rows = indices(labels, len(x), x.device), torch.stack((g, h))
    _, dx, dt, _ = sweep(Matrices(x, t, scale, bias, xt, tt, st, bt), same, same, rows, kept)
    return dx.to(x.dtype), dt.to(t.dtype), *by_numbers(rows, sums, scale, bias)


def _fake_sweep(x, t, scale, bias, x_labels, t_labels, xt, tt, st, bt, weight, similarities, keep, precision):
    dtype, (n, d), m, heads = accumulation_dtype(x.dtype), x.shape, t.shape[0], 1 if xt is None else 2
    gradients = (0 if weight is None else n, d), (0 if weight is None else m, d)
    shapes = (3 * heads, n), *gradients, (heads * n if keep else 0, m)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_contrastive_loss(x, t, scale, bias, labels, weight, reduction, keep):
    dtype, (n, d), total = accumulation_dtype(x.dtype), x.shape, reduction != "none"
    loss = x.new_empty(n, dtype=dtype)
    if total:
        loss = x.new_empty((), dtype=dtype if weight is None else torch.promote_types(dtype, weight.dtype))
    gradient, kept = x.new_empty(n if total else 0, d, dtype=dtype), x.new_empty(n if keep else 0, n, dtype=dtype)
    return loss, x.new_empty(3, n, dtype=dtype), gradient, torch.empty_like(gradient), kept


def _fake_totals(x, t, scale, bias, labels, mean, precision):
    return _fake_contrastive_loss(x, t, scale, bias, labels, None, "sum", False)


def _fake_contrastive_gradient(grad, x, t, scale, bias, labels, weight, *_):
    dweight = x.new_empty(0) if weight is None else contiguous_like(weight)
    return contiguous_like(x), contiguous_like(t), torch.empty_like(scale), torch.empty_like(bias), dweight


def _fake_distillation_loss(x, t, scale, bias, xt, tt, st, bt, labels, keep):
    n = x.shape[0]
    vector = x.new_empty(n, dtype=accumulation_dtype(x.dtype))
    return vector, torch.empty_like(vector), vector.new_empty(6, n), vector.new_empty(2 * n if keep else 0, n)


def _setup_contrastive(ctx, inputs, output):
    *tensors, ctx.reduction_within, _ = inputs
    _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward_contrastive(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, t, scale, bias, labels, weight, *kept = ctx.saved_tensors
    inputs = x, t, scale, bias, labels, weight, ctx.reduction_within
    *gradients, dweight = gradient("sigmoid_contrastive_loss", grad, *inputs, *kept)
    return *gradients, None, dweight if ctx.needs_input_grad[5] else None, None, None


def _backward_distillation(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 10
    g, h = both(g, h)
    gradients = gradient("sigmoid_contrastive_distillation_loss", g, h, *ctx.saved_tensors)
    return *gradients, *[None] * 6


def _sample_contrastive(source: Source) -> Iterator[tuple]:
    of = source.features(9, 5), source.features(9, 5), source.scale(7.0), source.scale(-2.0)
    yield *of, source.labels(9, 4), source.uniform(9, grad=True), "mean", False
    yield *of, None, None, "none", True
    yield *of, None, None, "none", False
    yield *of, source.labels(9, 4), None, "mean", False
    yield *of, None, source.uniform(9, grad=True), "sum", False
    yield *of, None, None, "sum", False


def _sample_distillation(source: Source) -> Iterator[tuple]:
    student = source.features(9, 5), source.features(9, 5), source.scale(7.0), source.scale(-2.0)
    teacher = source.features(9, 6, False), source.features(9, 6, False), source.scale(5.0, False)
    yield *student, *teacher, source.scale(-1.0, False), source.labels(9, 4), False
    yield *student, *teacher, source.scale(1.0, False), None, True


def _sample_sweep(source: Source) -> Iterator[tuple]:
    """Seven rows and nine columns of S."""
    n, m = 7, 9
    of = (
        *(source.features(n, 5, False), source.features(m, 5, False)),
        *(source.scale(7.0, False), source.scale(-2.0, False)),
        *(source.labels(n, 4), source.labels(m, 4)),
    )
    teacher = (
        *(source.features(n, 6, False), source.features(m, 6, False)),
        *(source.scale(5.0, False), source.scale(-1.0, False)),
    )
    for by, heads in (((None,) * 4, 1), (teacher, 2)):
        yield from ((*of, *by, None, None, keep, "highest") for keep in (False, True))
        for similarities in (None, source.uniform(heads * n, m).to(accumulation_dtype(source.dtype))):
            yield *of, *by, source.uniform(heads, n), similarities, False, "highest"


def _sample_totals(source: Source) -> Iterator[tuple]:
    features = source.features(9, 5, False), source.features(9, 5, False)
    for mean, labels in ((True, source.labels(9, 4)), (False, None)):
        yield *features, source.scale(7.0, False), source.scale(-2.0, False), labels, mean, "highest"


def _sample_scaled(source: Source) -> Iterator[tuple]:
    for *of, labels, mean, precision in _sample_totals(source):
        loss, *kept, _ = torch.ops.robustft.sigmoid_totals(*of, labels, mean, precision)
        yield torch.full_like(loss, 3.0), *of, *kept, mean


def _call_contrastive(source: Source) -> Iterator[Call]:
    for *of, labels, weight, reduction, keep in _sample_contrastive(source):
        options = {"reduction": reduction, "memory": "auto" if reduction != "none" or keep else 0}
        yield Call(tuple(of), {"labels": labels, "weight": weight, **options})


def _call_distillation(source: Source) -> Iterator[Call]:
    for *matrices, labels, keep in _sample_distillation(source):
        yield Call(tuple(matrices), {"labels": labels, "memory": "auto" if keep else 0})


register(Op("sigmoid_sweep", _fake_sweep, _sample_sweep, triton="sigmoid"))
register(Op("sigmoid_totals", _fake_totals, _sample_totals))
register(Op("sigmoid_scaled", lambda g, *of: _fake_contrastive_gradient(g, *of[:4], None, None)[:4], _sample_scaled))
register(
    Op(
        "sigmoid_contrastive_loss",
        _fake_contrastive_loss,
        _sample_contrastive,
        body=_contrastive_loss,
        kernel="sigmoid_sweep",
        backward=Backward(_setup_contrastive, _backward_contrastive, _fake_contrastive_gradient, _contrastive_gradient),
        public=_call_contrastive,
    )
)
register(
    Op(
        "sigmoid_contrastive_distillation_loss",
        _fake_distillation_loss,
        _sample_distillation,
        body=_contrastive_distillation_loss,
        kernel="sigmoid_sweep",
        backward=Backward(
            setup_two_losses,
            _backward_distillation,
            lambda g, h, x, t, scale, bias, *_: (
                *(contiguous_like(x), contiguous_like(t)),
                *(torch.empty_like(scale), torch.empty_like(bias)),
            ),
            _contrastive_distillation_gradient,
            results=2,
        ),
        public=_call_distillation,
    )
)


# A part of the compiled kernel, as an operator for the test that holds it to its error.
register(
    Op(
        "vector_softplus",
        lambda z: (contiguous_like(z), contiguous_like(z)),
        lambda source: [(source.normal(40),)],
        dtypes=(torch.float64, torch.float32),
    )
)
