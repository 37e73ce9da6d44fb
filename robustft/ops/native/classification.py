"""Losses on class logits z = s x w^T + b over the compiled class kernels (csrc/cpu/classes.cpp).

With the statistics of each row (max, log_sum, gaps and means; `above` the softmax over the classes that rank strictly
above the label), smoothing e and K classes,

    cross_entropy_i = log_sum + (1 - e) (max - z_y) + e (max - mean z)
    L_i             = above_log_sum + (max - z_y)      logsumexp of the misranked classes - z_y; top-1: max - z_y
    misalignment_i  = f(L_i), 0 where nothing is misranked;   f as named in ops/reference.py
    soft_i          = (sum q) log_sum + sum q (max - z)

and with per-sample gradients g, h of the two terms

    G_i = g (p - (1 - e) 1_y - e / K) + h f'(L_i) (above - 1_y)          soft: g ((sum q) p - q)

The scale's derivative of each is the same expression with z replaced by S and log_sum by a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops import reference
from robustft.ops.native.registration import accumulation_dtype, differentiable, fake, scale_gradient

# Rows of the kernels' statistics and coefficients: class_statistic and class_coefficient in csrc/cpu/classes.h.
_HARD_STATISTICS, _SOFT_STATISTICS = 10, 13


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
    statistics, similarity = torch.ops.robustft.class_statistics(x, w, scale, bias, labels, None, keep)
    _, log_sum, mean, label_gap, label, above_log_sum, above_mean, mean_gap, row_mean, max_s = statistics
    cross_entropy = log_sum + torch.lerp(label_gap, mean_gap, label_smoothing)
    by_scale = mean - torch.lerp(label, row_mean, label_smoothing)
    wrong = label_gap > 0
    gap = torch.where(wrong, label_gap if top1 else above_log_sum + label_gap, 0.0)
    misalignment = torch.where(wrong, reference.misalignment_of_gap(gap, variant), 0.0)
    by_gap = torch.where(wrong, _slope(gap, variant), 0.0)
    misalignment_by_scale = by_gap * ((max_s if top1 else above_mean) - label)
    scale_gradients = torch.stack((by_scale, misalignment_by_scale))
    kept = torch.stack((statistics[0], log_sum, torch.where(wrong, above_log_sum, 0.0)))
    return cross_entropy, misalignment, by_gap, scale_gradients, kept, similarity


def _classification_gradient(
    g, h, x, w, scale, bias, labels, top1, label_smoothing, by_gap, by_scale, kept, similarity
):
    ds = scale_gradient(scale, (g, by_scale[0]), (h, by_scale[1]))
    g, c = g.to(kept.dtype), h.to(kept.dtype) * by_gap
    uniform = g * (label_smoothing / len(w))
    coefficients = torch.stack((*kept, g, (1 - label_smoothing) * g, uniform, torch.zeros_like(g), c))
    gradients = torch.ops.robustft.class_gradient(x, w, scale, bias, labels, None, similarity, coefficients, top1)
    return *gradients, ds


def _soft_classification_loss(x, w, scale, targets, keep):
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    statistics, similarity = torch.ops.robustft.class_statistics(x, w, scale, None, labels, targets, keep)
    q_sum, q_gap, q_s = statistics[10:]
    loss = q_sum * statistics[1] + q_gap
    scale_gradient = q_sum * statistics[2] - q_s
    return loss, scale_gradient, torch.stack((statistics[0], statistics[1], q_sum)), similarity


def _soft_classification_gradient(g, x, w, scale, targets, by_scale, kept, similarity):
    ds = scale_gradient(scale, (g, by_scale))
    g = g.to(kept.dtype)
    zero = torch.zeros_like(g)
    coefficients = torch.stack((kept[0], kept[1], zero, g * kept[2], zero, zero, g, zero))
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    gradients = torch.ops.robustft.class_gradient(x, w, scale, None, labels, targets, similarity, coefficients, False)
    return *gradients[:2], ds


def _fake_statistics(x, w, scale, bias, labels, targets, keep):
    dtype = accumulation_dtype(x.dtype)
    kinds = _HARD_STATISTICS if targets is None else _SOFT_STATISTICS
    n = x.shape[0]
    return x.new_empty(kinds, n, dtype=dtype), x.new_empty(n if keep else 0, w.shape[0], dtype=dtype)


def _fake_gradient(x, w):
    def like(a):
        return torch.empty_like(a, memory_format=torch.contiguous_format)

    return like(x), like(w), w.new_empty(w.shape[0], dtype=accumulation_dtype(w.dtype))


def _fake_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep):
    n = x.shape[0]
    statistics, similarity = _fake_statistics(x, w, scale, bias, labels, None, keep)
    new = statistics.new_empty
    return new(n), new(n), new(n), new(2, n), new(3, n), similarity


def _fake_soft_loss(x, w, scale, targets, keep):
    n = x.shape[0]
    statistics, similarity = _fake_statistics(x, w, scale, None, None, targets, keep)
    return statistics.new_empty(n), statistics.new_empty(n), statistics.new_empty(3, n), similarity


def _setup(ctx, inputs, output):
    *tensors, _, ctx.top1, ctx.label_smoothing, _ = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)


def _backward(ctx, g, h, *_):
    x, w, scale, bias, labels, *kept = ctx.saved_tensors
    dx, dw, db, ds = torch.ops.robustft.classification_loss_backward(
        g, h, x, w, scale, bias, labels, ctx.top1, ctx.label_smoothing, *kept
    )
    return dx, dw, ds, None if bias is None else db.to(bias.dtype), None, None, None, None, None


def _setup_soft(ctx, inputs, output):
    *tensors, _ = inputs
    _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)


def _backward_soft(ctx, g, *_):
    return *torch.ops.robustft.soft_classification_loss_backward(g, *ctx.saved_tensors), None, None


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
        "soft_classification_loss",
        (_soft_classification_loss, _fake_soft_loss),
        (_setup_soft, _backward_soft),
        (
            _soft_classification_gradient,
            lambda g, x, w, scale, *_: (*_fake_gradient(x, w)[:2], torch.empty_like(scale)),
        ),
    )
