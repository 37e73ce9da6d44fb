"""Contrastive losses over the similarity kernels.

The kernels know two things of S = x t^T: softmax statistics of its rows and columns, and the gradient that coefficients
of rows and columns lead to (similarity.py). A loss is a few lines of N-vector algebra between the two, and these are
those lines; the bodies that compute it whole (csrc/cpu/similarity/pair_losses.cpp; triton/combine.py and gradient.py)
have the same ones within. With q the targets and,
per row i, the statistics max, log_sum, gap = E_p[S] - max and teacher_gap = E_teacher[S] - max (primes: by columns)

    contrastive_i   = 1/2 [log_sum + s (max - (q S)_i)  +  log_sum' + s (max' - (q S^T)_i)]
    distillation_i  = log_sum - s teacher_gap  +  log_sum' - s teacher_gap'
    d/ds            = the same with log_sum replaced by gap and s by 1

and with per-sample gradients g (contrastive) and h (distillation)

    G_ij = (g_i/2 + h_i) p_ij + (g_j/2 + h_j) p'_ij - (g_i + g_j)/2 q_ij - h_i pt_ij - h_j pt'_ij,   dx = s G t.

Everything is computed from one sweep in the forward and one in the backward. The scale's gradient is known in the
forward, free of the cancellation that sum(G * S) suffers. The gradients themselves cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustft.ops import layouts, reference, registry, similarity
from robustft.ops.dispatch import body_of
from robustft.ops.registry import (
    Backward,
    Call,
    Op,
    Source,
    accumulation_dtype,
    both,
    call,
    gradient,
    reduced,
    register,
    setup_two_losses,
)
from robustft.ops.similarity import Coefficients, Softmaxes, Statistics


def contrastive_loss(
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    label_smoothing: float,
    memory: str | int,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Of the per-sample losses, (n,), what `registry.reduced` gives."""
    body = body_of("contrastive_loss", x)
    if body == "reference":
        return reduced(reference.contrastive_loss(x, t, scale, labels, label_smoothing), weight, reduction)
    keep = layouts.fits(memory, body, x.shape[0], t.shape[0], x, 1) and torch.is_grad_enabled()
    inputs = x, t, scale, labels, label_smoothing, keep
    return call("contrastive_loss", *inputs, weight=weight, reduction=reduction)[0]


def contrastive_distillation_loss(
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    x_teacher: Tensor,
    t_teacher: Tensor,
    teacher_scale: Tensor,
    *,
    labels: Tensor | None,
    memory: str | int,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Contrastive and distillation losses, (n,) each, as `contrastive_loss`."""
    matrices = x, t, scale, x_teacher, t_teacher, teacher_scale
    body = body_of("contrastive_distillation_loss", x)
    if body == "reference":
        losses = reference.contrastive_distillation_loss(*matrices, labels)
        return tuple(reduced(term, weight, reduction) for term in losses)
    keep = layouts.fits(memory, body, x.shape[0], t.shape[0], x, 2) and torch.is_grad_enabled()
    name, inputs = "contrastive_distillation_loss", (*matrices, labels, keep)
    return call(name, *inputs, weight=weight, reduction=reduction)


def label_counts(labels: Tensor | None, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels and how often each sample's occurs; on the CPU renumbered from 0, since its kernels compare 32 bits."""
    if labels is None:
        return torch.arange(n, device=device), torch.ones(n, dtype=dtype, device=device)
    if device.type != "cpu":  # torch.unique would wait for the device
        ordered = labels.sort().values
        counts = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        return labels, counts.to(dtype)
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return index, counts[index].to(dtype)


def contrastive_terms(
    row: Statistics, col: Statistics, s: Tensor, counts: Tensor, entries: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Per-sample contrastive losses and their derivatives by the scale; `entries` is the length of a row of S."""

    def target_gap(of: Statistics) -> Tensor:  # max - (q S), exactly 0 for constant S
        gap = of.max - of.target / counts
        return gap if label_smoothing == 0 else torch.lerp(gap, of.max - of.total / entries, label_smoothing)

    row_gap, col_gap = target_gap(row), target_gap(col)
    loss = 0.5 * ((row.log_sum + s * row_gap) + (col.log_sum + s * col_gap))
    return loss, 0.5 * ((row.gap + row_gap) + (col.gap + col_gap))


def distillation_terms(row: Statistics, col: Statistics, s: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample distillation losses and their derivatives by the scale."""
    assert row.teacher_gap is not None and col.teacher_gap is not None
    loss = (row.log_sum - s * row.teacher_gap) + (col.log_sum - s * col.teacher_gap)
    return loss, (row.gap - row.teacher_gap) + (col.gap - col.teacher_gap)


def coefficients(
    of: Softmaxes, g: Tensor, counts: Tensor, entries: int, label_smoothing: float, h: Tensor | None = None
) -> Tensor:
    """Rows of `Coefficients` of one side, from its softmaxes and the gradients by its samples' losses."""
    half = 0.5 * g.to(of.max.dtype)
    target = (1 - label_smoothing) * half / counts
    # What target leaves of half, rather than label_smoothing * half: where p equals q the gradient is then exactly 0.
    uniform = (half - target * counts) / entries if label_smoothing else torch.zeros_like(half)
    if h is None:
        return Coefficients(of.max, of.log_sum, half, target, uniform).rows()
    h = h.to(half.dtype)
    teacher = of.teacher_max, of.teacher_log_sum, h
    return Coefficients(of.max, of.log_sum, half + h, target, uniform, *teacher).rows()


def kept_softmaxes(of: Statistics) -> Tensor:
    """Rows of `Softmaxes`, for the backward."""
    return Softmaxes(of.max, of.log_sum, of.teacher_max, of.teacher_log_sum).rows()


# csrc/cpu/similarity/pair_losses.cpp has both losses in one operator each way.


def _contrastive_loss(x, t, scale, labels, label_smoothing, keep, mean=False):
    precision = torch.get_float32_matmul_precision()
    contrastive, _, *kept = torch.ops.robustft.pair_losses(
        x, t, scale, None, None, None, labels, label_smoothing, keep, mean, precision
    )
    return contrastive, *kept


def _contrastive_gradient(grad, x, t, scale, labels, label_smoothing, *kept):
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.pair_gradients(
        grad, None, x, t, scale, None, None, None, labels, label_smoothing, *kept, precision
    )


def _contrastive_distillation_loss(x, t, scale, xt, tt, st, labels, keep, mean=False):
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.pair_losses(x, t, scale, xt, tt, st, labels, 0.0, keep, mean, precision)


def _contrastive_distillation_gradient(g, h, x, t, scale, xt, tt, st, labels, *kept):
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.pair_gradients(g, h, x, t, scale, xt, tt, st, labels, 0.0, *kept, precision)


def _fake_pair_losses(x, t, scale, xt, tt, st, labels, label_smoothing, keep, mean, precision):
    dtype, heads, each = accumulation_dtype(x.dtype), 1 if xt is None else 2, () if mean else (len(x),)
    contrastive = x.new_empty(each, dtype=dtype)
    sides = (contrastive.new_empty(2 * heads, len(x)) for _ in range(2))
    kept = layouts.similarities("compiled", len(x), len(t), heads, keep, x.dtype).like(x)
    distillation = contrastive.new_empty(each if heads == 2 else (0,))
    by_scale = contrastive.new_empty((2, len(x)) if heads == 2 else (len(x),))
    return contrastive, distillation, by_scale, *sides, *kept


def _fake_pair_gradients(g, h, x, t, scale, *_):
    return *similarity.fake_gradient(x, t), torch.empty_like(scale)


def _fake_kept(op: str, x: Tensor, t: Tensor, heads: int, keep: bool) -> tuple[Tensor, ...]:
    """row and col, records and exponentials: what only a device's own backward reads."""
    rows = layouts.sides(registry.body(op, x.device, x.dtype), heads)
    sides = (x.new_empty(k, len(x), dtype=accumulation_dtype(x.dtype)) for k in rows)
    return *sides, *similarity.fake_kept(op, x, t, heads, keep)


def _fake_contrastive_loss(x, t, scale, labels, label_smoothing, keep):
    vector = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    return vector, torch.empty_like(vector), *_fake_kept("contrastive_loss", x, t, 1, keep)


def _fake_contrastive_distillation_loss(x, t, scale, xt, tt, st, labels, keep):
    vector = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    vectors = vector, torch.empty_like(vector), vector.new_empty(2, len(x))
    return *vectors, *_fake_kept("contrastive_distillation_loss", x, t, 2, keep)


def _setup_contrastive(ctx, inputs, output):
    *tensors, ctx.label_smoothing, _ = inputs
    _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else the backward would be given zeros of the size of what is kept


def _backward_contrastive(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    x, t, scale, labels, *kept = ctx.saved_tensors
    gradients = gradient("contrastive_loss", grad, x, t, scale, labels, ctx.label_smoothing, *kept)
    return *gradients, None, None, None


def _backward_distillation(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 8
    g, h = both(g, h)
    gradients = gradient("contrastive_distillation_loss", g, h, *ctx.saved_tensors)
    return *gradients, *[None] * 5


def _sample_contrastive(source: Source) -> Iterator[tuple]:
    x, t, scale = source.features(9, 5), source.features(9, 5), source.scale(7.0)
    yield x, t, scale, source.labels(9, 4), 0.1, False
    yield x, t, scale, None, 0.0, True


def _sample_distillation(source: Source) -> Iterator[tuple]:
    student = source.features(9, 5), source.features(9, 5), source.scale(7.0)
    teacher = source.features(9, 6, False), source.features(9, 6, False), source.scale(5.0, False)
    yield *student, *teacher, source.labels(9, 4), False
    yield *student, *teacher, None, True


def _sample_pair_losses(source: Source) -> Iterator[tuple]:
    for x, t, scale, labels, label_smoothing, keep in _sample_contrastive(source):
        yield x.detach(), t.detach(), scale.detach(), None, None, None, labels, label_smoothing, keep, keep, "highest"
    for *matrices, labels, keep in _sample_distillation(source):
        yield *(of.detach() for of in matrices), labels, 0.0, keep, not keep, "highest"


def _sample_pair_gradients(source: Source) -> Iterator[tuple]:
    for *matrices, labels, label_smoothing, keep, mean, precision in _sample_pair_losses(source):
        found = torch.ops.robustft.pair_losses(*matrices, labels, label_smoothing, keep, mean, precision)
        contrastive, distillation, *kept = found
        g, h = torch.ones_like(contrastive), torch.ones_like(distillation) if distillation.numel() else None
        yield g, h, *matrices, labels, label_smoothing, *kept, precision


def _call_contrastive(source: Source) -> Iterator[Call]:
    for x, t, scale, labels, label_smoothing, keep in _sample_contrastive(source):
        options = {"labels": labels, "label_smoothing": label_smoothing, "memory": "auto" if keep else 0}
        yield Call((x, t, scale), {**options, "weight": source.uniform(len(x), grad=True)})


def _call_distillation(source: Source) -> Iterator[Call]:
    for *matrices, labels, keep in _sample_distillation(source):
        yield Call(tuple(matrices), {"labels": labels, "memory": "auto" if keep else 0})


register(Op("pair_losses", _fake_pair_losses, _sample_pair_losses))
register(Op("pair_gradients", _fake_pair_gradients, _sample_pair_gradients))
register(
    Op(
        "contrastive_loss",
        _fake_contrastive_loss,
        _sample_contrastive,
        body=_contrastive_loss,
        kernel="pair_losses",
        backward=Backward(
            _setup_contrastive,
            _backward_contrastive,
            lambda grad, x, t, scale, *_: (*similarity.fake_gradient(x, t), torch.empty_like(scale)),
            _contrastive_gradient,
            means=True,
        ),
        triton="contrastive",
        public=_call_contrastive,
    )
)
register(
    Op(
        "contrastive_distillation_loss",
        _fake_contrastive_distillation_loss,
        _sample_distillation,
        body=_contrastive_distillation_loss,
        kernel="pair_losses",
        backward=Backward(
            setup_two_losses,
            _backward_distillation,
            lambda g, h, x, t, scale, *_: (*similarity.fake_gradient(x, t), torch.empty_like(scale)),
            _contrastive_distillation_gradient,
            results=2,
            means=True,
        ),
        triton="contrastive",
        public=_call_distillation,
    )
)
