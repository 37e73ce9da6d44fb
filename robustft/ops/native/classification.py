"""Losses on class logits z = s x w^T + b over the compiled class kernels (csrc/cpu/classes.cpp).

`dual_risk` has two heads: its w (2K, D) holds one below the other, its statistics likewise.


With the statistics of each row (max, log_sum, gaps and means; `above` the softmax over the classes that rank strictly
above the label), smoothing e and K classes,

    cross_entropy_i = log_sum + (1 - e) (max - z_y) + e (max - mean z)
    L_i             = above_log_sum + (max - z_y)      logsumexp of the misranked classes - z_y; top-1: max - z_y
    misalignment_i  = f(L_i), 0 where nothing is misranked;   f as named in ops/reference.py
    worst_case_i    = (sum q) log_sum + sum q (max - z)     confidences: q = confidence 1_y

and with per-sample gradients g, h of the two terms

    G_i = g (p - (1 - e) 1_y - e / K) + h f'(L_i) (above - 1_y)          soft: g ((sum q) p - q)

The scale's derivative of each is the same expression with z replaced by S and log_sum by a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops import reference, triton
from robustft.ops.native.registration import accumulation_dtype, both, call, contiguous_like, differentiable, fake
from robustft.ops.triton import configs

# Rows of the kernels' statistics and coefficients: class_statistic and class_coefficient in csrc/cpu/classes.h.
_STATISTICS, _TARGET_STATISTICS = 10, 3


def classification_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep):
    """Cross-entropy and misalignment, two (N,)."""
    return call("classification_loss", x, w, scale, bias, labels, variant, top1, label_smoothing, keep)[:2]


def dual_risk(x, w, scale, labels, core, keep):
    """Empirical and worst-case risk, two (N,)."""
    return call("dual_risk", x, w, scale, labels, core, keep)[:2]


def _slope(gap: Tensor, variant: str) -> Tensor:
    """f'(L)."""
    match variant:
        case "neg_log_ratio":
            return torch.ones_like(gap)
        case "neg_ratio":
            return torch.exp(-gap)
        case "softplus":
            return torch.sigmoid(gap)
        case _:
            return -torch.exp(-gap)


def _classification_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep):
    precision = torch.get_float32_matmul_precision()
    statistics, exponentials = torch.ops.robustft.class_statistics(
        x, w, scale, bias, labels, None, 1, True, label_smoothing > 0, keep, precision
    )
    _, log_sum, above_log_sum, mean, label_gap, label, above_mean, max_s, mean_gap, row_mean = statistics
    wrong = above_log_sum > -torch.inf
    gap = torch.where(wrong, label_gap if top1 else above_log_sum + label_gap, 0.0)
    misalignment, by_gap = gap, wrong.to(gap.dtype)
    if variant != "neg_log_ratio":
        misalignment, by_gap = by_gap * reference.misalignment_of_gap(gap, variant), by_gap * _slope(gap, variant)
    by_misalignment = by_gap * ((max_s if top1 else above_mean) - label)
    if label_smoothing:
        label_gap, label = (
            torch.lerp(label_gap, mean_gap, label_smoothing),
            torch.lerp(label, row_mean, label_smoothing),
        )
    by_scale = torch.stack((mean - label, by_misalignment))
    return log_sum + label_gap, misalignment, by_gap, by_scale, statistics[:3].clone(), exponentials


def _classification_gradient(
    g, h, x, w, scale, bias, labels, top1, label_smoothing, by_gap, by_scale, kept, exponentials
):
    ds = _scale_gradient(scale, g, h, by_scale)
    highest, log_sum, above_log_sum = kept
    g, c = g.to(kept.dtype), h.to(kept.dtype) * by_gap
    uniform = zero = torch.zeros_like(g)
    label = g
    if label_smoothing:
        label, uniform = (1 - label_smoothing) * g, g * (label_smoothing / len(w))
    coefficients = torch.stack((highest, log_sum, above_log_sum, g, label, uniform, zero, c))
    precision = torch.get_float32_matmul_precision()
    gradients = torch.ops.robustft.class_gradient(
        x, w, scale, bias, labels, None, 1, exponentials, coefficients, top1, precision
    )
    return *gradients, ds


def _dual_risk(x, w, scale, labels, core, keep):
    targets = core if core.dim() == 2 else None
    precision = torch.get_float32_matmul_precision()
    statistics, exponentials = torch.ops.robustft.class_statistics(
        x, w, scale, None, labels, targets, 2, False, False, keep, precision
    )
    highest, log_sum, _, mean, label_gap, label = statistics[:6]
    core_highest, core_log_sum, _, core_mean, core_label_gap, core_label = statistics[_STATISTICS : _STATISTICS + 6]
    if targets is None:
        mass = core.to(statistics.dtype)
        gap, target = mass * core_label_gap, mass * core_label
    else:
        mass, gap, target = statistics[2 * _STATISTICS :]
    by_scale = torch.stack((mean - label, mass * core_mean - target))
    kept = torch.stack((highest, log_sum, core_highest, core_log_sum, mass))
    return log_sum + label_gap, mass * core_log_sum + gap, by_scale, kept, exponentials


def _scale_gradient(scale, g, h, by_scale):
    return (torch.stack((g, h)) * by_scale).sum().to(scale.dtype).reshape(scale.shape)


def _dual_gradient(g, h, x, w, scale, labels, core, by_scale, kept, exponentials):
    ds = _scale_gradient(scale, g, h, by_scale)
    highest, log_sum, core_highest, core_log_sum, mass = kept
    g, h = g.to(kept.dtype), h.to(kept.dtype)
    zero, p = torch.zeros_like(g), h * mass
    one_hot, soft, targets = (zero, h, core) if core.dim() == 2 else (p, zero, None)
    first = (highest, log_sum, zero, g, g, zero, zero, zero)
    second = (core_highest, core_log_sum, zero, p, one_hot, zero, soft, zero)
    precision = torch.get_float32_matmul_precision()
    dx, dw, _ = torch.ops.robustft.class_gradient(
        x, w, scale, None, labels, targets, 2, exponentials, torch.stack((*first, *second)), False, precision
    )
    return dx, dw, ds


def _fake_statistics(x, w, scale, bias, labels, targets, heads, misranked, means, keep, precision):
    dtype = accumulation_dtype(x.dtype)
    kinds = heads * _STATISTICS + (0 if targets is None else _TARGET_STATISTICS)
    n = x.shape[0]
    return x.new_empty(kinds, n, dtype=dtype), x.new_empty(n if keep else 0, w.shape[0], dtype=dtype)


def _fake_gradient(x, w):
    return contiguous_like(x), contiguous_like(w), w.new_empty(w.shape[0], dtype=accumulation_dtype(w.dtype))


def _fake_kept(x, k: int, heads: int, rows: int, keep: bool):
    """What only a device's own backward reads, of Triton's own shapes where it computes."""
    n = x.shape[0]
    if triton.computes("classification_loss", x.device, x.dtype):
        shapes = configs.class_kept_like(n, k, heads, keep, x.dtype)
        return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(rows, n, dtype=dtype), x.new_empty(n if keep else 0, heads * k, dtype=dtype)


def _fake_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep):
    cross_entropy, misalignment, by_gap = (x.new_empty(len(x), dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    by_scale = by_gap.new_empty(2, len(x))
    return cross_entropy, misalignment, by_gap, by_scale, *_fake_kept(x, w.shape[0], 1, 3, keep)


def _fake_dual_risk(x, w, scale, labels, core, keep):
    empirical, worst_case = (x.new_empty(len(x), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return empirical, worst_case, empirical.new_empty(2, len(x)), *_fake_kept(x, w.shape[0] // 2, 2, 5, keep)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.top1, ctx.label_smoothing, _ = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else the backward would be given zeros of the size of what is kept


def _backward(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 9
    g, h = both(g, h)
    x, w, scale, bias, labels, *kept = ctx.saved_tensors
    dx, dw, db, ds = torch.ops.robustft.classification_loss_backward(
        g, h, x, w, scale, bias, labels, ctx.top1, ctx.label_smoothing, *kept
    )
    return dx, dw, ds, None if bias is None else db.to(bias.dtype), None, None, None, None, None


def _setup_dual(ctx, inputs, output):
    *tensors, _ = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else the backward would be given zeros of the size of what is kept


def _backward_dual(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 6
    g, h = both(g, h)
    return *torch.ops.robustft.dual_risk_backward(g, h, *ctx.saved_tensors), None, None, None


def register() -> None:
    fake("class_statistics", _fake_statistics)
    fake("class_gradient", lambda x, w, *_: _fake_gradient(x, w))
    differentiable(
        "classification_loss",
        (_classification_loss, _fake_loss),
        (_setup, _backward),
        (_classification_gradient, lambda g, h, x, w, scale, *_: (*_fake_gradient(x, w), torch.empty_like(scale))),
    )
    differentiable(
        "dual_risk",
        (_dual_risk, _fake_dual_risk),
        (_setup_dual, _backward_dual),
        (_dual_gradient, lambda g, h, x, w, scale, *_: (*_fake_gradient(x, w)[:2], torch.empty_like(scale))),
    )
