"""Contrastive losses over the compiled similarity kernels.

The compiled code knows two things of S = x t^T: softmax statistics of its rows and columns, and the gradient that
coefficients of those statistics lead to (csrc/cpu/similarity.cpp). A loss is a few lines of N-vector algebra between
the two, and these are those lines. With q the targets and, per row i, the statistics max, log_sum,
gap = E_p[S] - max and gap_t = E_teacher[S] - max (primes: the same by columns)

    contrastive_i   = 1/2 [log_sum + s (max - (q S)_i)  +  log_sum' + s (max' - (q S^T)_i)]
    distillation_i  = log_sum - s gap_t  +  log_sum' - s gap_t'
    d/ds            = the same with log_sum replaced by gap and s by 1

and with per-sample gradients g (contrastive) and h (distillation)

    G_ij = (g_i/2 + h_i) p_ij + (g_j/2 + h_j) p'_ij - (g_i + g_j)/2 q_ij - h_i pt_ij - h_j pt'_ij,   dx = s G t.

Everything is computed from one sweep in the forward and one in the backward. The scale's gradient is known in the
forward, free of the cancellation that sum(G * S) suffers. The gradients themselves cannot be differentiated again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops import triton
from robustft.ops.native.registration import (
    accumulation_dtype,
    both,
    call,
    contiguous_like,
    differentiable,
    fake,
    scale_gradient,
)
from robustft.ops.triton import configs


def contrastive_loss(x, t, scale, labels, label_smoothing, keep) -> Tensor:
    """(n,) per-sample losses."""
    return call("contrastive_loss", x, t, scale, labels, label_smoothing, keep)[0]


def contrastive_distillation_loss(x, t, scale, xt, tt, st, labels, keep) -> tuple[Tensor, Tensor]:
    """Two (n,): contrastive and distillation."""
    return call("contrastive_distillation_loss", x, t, scale, xt, tt, st, labels, keep)[:2]


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
    row: Tensor, col: Tensor, s: Tensor, counts: Tensor, entries: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Per-sample contrastive losses and their derivatives by the scale; `entries` is the length of a row of S."""

    def target_gap(highest: Tensor, target: Tensor, total: Tensor) -> Tensor:  # max - (q S), exactly 0 for constant S
        gap = highest - target / counts
        return gap if label_smoothing == 0 else torch.lerp(gap, highest - total / entries, label_smoothing)

    row_gap, col_gap = target_gap(row[0], row[3], row[4]), target_gap(col[0], col[3], col[4])
    loss = 0.5 * ((row[1] + s * row_gap) + (col[1] + s * col_gap))
    return loss, 0.5 * ((row[2] + row_gap) + (col[2] + col_gap))


def distillation_terms(row: Tensor, col: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample distillation losses and their derivatives by the scale."""
    loss = (row[1] - s * row[7]) + (col[1] - s * col[7])
    return loss, (row[2] - row[7]) + (col[2] - col[7])


def coefficients(
    kept: Tensor, g: Tensor, counts: Tensor, entries: int, label_smoothing: float, h: Tensor | None = None
) -> Tensor:
    """What `similarity_gradient` needs of one side, from the statistics kept for the backward (`kept_statistics`)."""
    half = 0.5 * g.to(kept.dtype)
    target = (1 - label_smoothing) * half / counts
    # What target leaves of half, rather than label_smoothing * half: where p equals q the gradient is then exactly 0.
    uniform = (half - target * counts) / entries if label_smoothing else torch.zeros_like(half)
    if h is None:
        return torch.stack((kept[0], kept[1], half, target, uniform))
    h = h.to(kept.dtype)
    return torch.stack((kept[0], kept[1], half + h, target, uniform, kept[2], kept[3], h))


def kept_statistics(statistics: Tensor) -> Tensor:
    """max, log_sum and, with a teacher, its own: (2 or 4, n), a copy that lets the rest go."""
    return statistics[:2].clone() if len(statistics) == 5 else torch.cat((statistics[:2], statistics[5:7]))


def statistics(matrices: tuple, index: Tensor, totals: bool, keep: bool) -> tuple[Tensor, ...]:
    """row, col, centers, kept of matrices = (x, t, scale, teacher's or None ...)."""
    x, t, scale, *teacher = matrices
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.similarity_statistics(x, t, scale, index, index, *teacher, totals, keep, precision)


def _contrastive_loss(x, t, scale, labels, label_smoothing, keep):
    index, counts = label_counts(labels, len(x), x.device, accumulation_dtype(x.dtype))
    row, col, *kept = statistics((x, t, scale, None, None, None), index, label_smoothing > 0, keep)
    terms = contrastive_terms(row, col, scale.to(row.dtype), counts, len(t), label_smoothing)
    return *terms, kept_statistics(row), kept_statistics(col), *kept


def _contrastive_gradient(grad, x, t, scale, labels, label_smoothing, by_scale, row, col, centers, kept):
    index, counts = label_counts(labels, len(x), x.device, row.dtype)
    row_c, col_c = (coefficients(side, grad, counts, len(t), label_smoothing) for side in (row, col))
    precision = torch.get_float32_matmul_precision()
    dx, dt = torch.ops.robustft.similarity_gradient(
        x, t, scale, index, index, None, None, None, row_c, col_c, centers, kept, label_smoothing > 0, precision
    )
    return dx, dt, scale_gradient(scale, (grad, by_scale))


def _contrastive_distillation_loss(x, t, scale, xt, tt, st, labels, keep):
    index, counts = label_counts(labels, len(x), x.device, accumulation_dtype(x.dtype))
    row, col, *kept = statistics((x, t, scale, xt, tt, st), index, False, keep)
    s = scale.to(row.dtype)
    contrastive, by_scale = contrastive_terms(row, col, s, counts, len(t), 0.0)
    distillation, distillation_by_scale = distillation_terms(row, col, s)
    scale_gradients = torch.stack((by_scale, distillation_by_scale))
    return contrastive, distillation, scale_gradients, kept_statistics(row), kept_statistics(col), *kept


def _contrastive_distillation_gradient(g, h, x, t, scale, xt, tt, st, labels, by_scale, row, col, centers, kept):
    index, counts = label_counts(labels, len(x), x.device, row.dtype)
    row_c, col_c = (coefficients(side, g, counts, len(t), 0.0, h) for side in (row, col))
    precision = torch.get_float32_matmul_precision()
    dx, dt = torch.ops.robustft.similarity_gradient(
        x, t, scale, index, index, xt, tt, st, row_c, col_c, centers, kept, False, precision
    )
    return dx, dt, scale_gradient(scale, (g, by_scale[0]), (h, by_scale[1]))


def _fake_kept(x: Tensor, t: Tensor, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    """centers, one for every 64 x 128 logits and two more a row, and kept; of Triton's own shapes where it computes."""
    n, m, dtype = x.shape[0], t.shape[0], accumulation_dtype(x.dtype)
    if triton.computes("contrastive_loss", x.device, x.dtype):
        return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in configs.kept_like(n, m, heads, keep, x.dtype))
    centers = x.new_empty(heads, (n + 63) // 64, (m + 127) // 128 + 2, dtype=dtype)
    return centers, x.new_empty(heads * n if keep else 0, m, dtype=dtype)


def _fake_sides(x: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """row and col, which only a device's own backward reads."""
    rows = (11, 8) if triton.computes("contrastive_loss", x.device, x.dtype) else (kinds, kinds)
    return tuple(x.new_empty(k, len(x), dtype=accumulation_dtype(x.dtype)) for k in rows)


def _fake_contrastive_loss(x, t, scale, labels, label_smoothing, keep):
    vector = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    return vector, torch.empty_like(vector), *_fake_sides(x, 2), *_fake_kept(x, t, 1, keep)


def _fake_contrastive_distillation_loss(x, t, scale, xt, tt, st, labels, keep):
    vector = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    vectors = vector, torch.empty_like(vector), vector.new_empty(2, len(x))
    return *vectors, *_fake_sides(x, 4), *_fake_kept(x, t, 2, keep)


def _fake_gradient(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(t)


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
    gradients = torch.ops.robustft.contrastive_loss_backward(grad, x, t, scale, labels, ctx.label_smoothing, *kept)
    return *gradients, None, None, None


def _setup_distillation(ctx, inputs, output):
    *tensors, _ = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward_distillation(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 8
    g, h = both(g, h)
    gradients = torch.ops.robustft.contrastive_distillation_loss_backward(g, h, *ctx.saved_tensors)
    return *gradients, *[None] * 5


def _fake_statistics(x, t, scale, x_labels, t_labels, xt, tt, st, totals, keep, precision):
    kinds, heads = (5, 1) if xt is None else (8, 2)
    dtype = accumulation_dtype(x.dtype)
    row, col = (x.new_empty(kinds, side.shape[0], dtype=dtype) for side in (x, t))
    return row, col, *_fake_kept(x, t, heads, keep)


def register() -> None:
    fake("similarity_statistics", _fake_statistics)
    fake("similarity_gradient", lambda x, t, *_: _fake_gradient(x, t))
    differentiable(
        "contrastive_loss",
        (_contrastive_loss, _fake_contrastive_loss),
        (_setup_contrastive, _backward_contrastive),
        (_contrastive_gradient, lambda grad, x, t, scale, *_: (*_fake_gradient(x, t), torch.empty_like(scale))),
    )
    differentiable(
        "contrastive_distillation_loss",
        (_contrastive_distillation_loss, _fake_contrastive_distillation_loss),
        (_setup_distillation, _backward_distillation),
        (
            _contrastive_distillation_gradient,
            lambda g, h, x, t, scale, *_: (*_fake_gradient(x, t), torch.empty_like(scale)),
        ),
    )
