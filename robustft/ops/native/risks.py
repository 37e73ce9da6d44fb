"""Autograd of the operators on N losses, or N rows of logits, that exist already.

On the CPU their bodies are compiled whole: csrc/cpu/group_risk.cpp, misalignment.cpp and cvar.cpp; for CUDA
csrc/cuda/group_risk.cu and cvar.cu are. On other devices `group_risk` is composed from `group_sums`.
"""

from __future__ import annotations

import torch

from robustft.ops import reference
from robustft.ops.native.registration import accumulation_dtype, call, contiguous_like, differentiable, fake


def group_risk(losses, groups, num_groups):
    return call("group_risk", losses, groups, num_groups)


def misalignment_penalty(logits, labels, variant, top1):
    return call("misalignment_penalty", logits, labels, variant, top1)


def cvar(losses, alpha):
    return call("cvar", losses, alpha)


def _group_risk(losses, groups, num_groups):
    return reference.risk_of_sums(*torch.ops.robustft.group_sums(losses, groups, num_groups))


def _group_risk_gradient(mean, worst, groups, worst_group, counts):
    by_group = worst.new_zeros(counts.shape) if mean is None else mean
    if worst is not None:
        by_group = by_group.index_add(0, worst_group.reshape(1), worst.reshape(1))
    return (by_group / counts.clamp(min=1))[groups]


def _setup_group_risk(ctx, inputs, output):
    losses, groups, _ = inputs
    _, _, worst_group, counts = output
    ctx.dtype = losses.dtype
    ctx.save_for_backward(groups, worst_group, counts)
    ctx.mark_non_differentiable(worst_group, counts)
    ctx.set_materialize_grads(False)


def _backward_group_risk(ctx, mean, worst, *_):
    if mean is None and worst is None:
        return None, None, None
    gradient = torch.ops.robustft.group_risk_backward(mean, worst, *ctx.saved_tensors)
    return gradient.to(ctx.dtype), None, None


def _fake_sums(values, groups, num_groups):
    sums = values.new_empty(num_groups, dtype=accumulation_dtype(values.dtype))
    return sums, groups.new_empty(num_groups, dtype=torch.int64)


def _fake_group_risk(losses, groups, num_groups):
    mean, counts = _fake_sums(losses, groups, num_groups)
    return mean, mean.new_empty(()), counts.new_empty(()), counts


def _fake_group_risk_gradient(mean, worst, groups, worst_group, counts):
    return groups.new_empty(groups.shape, dtype=(worst if mean is None else mean).dtype)


def _setup_misalignment(ctx, inputs, output):
    logits, labels, _, ctx.top1 = inputs
    _, errors, kept = output
    ctx.save_for_backward(logits, labels, kept)
    ctx.mark_non_differentiable(errors, kept)
    ctx.set_materialize_grads(False)


def _backward_misalignment(ctx, grad, *_):
    if grad is None:
        return None, None, None, None
    logits, labels, kept = ctx.saved_tensors
    gradient = torch.ops.robustft.misalignment_penalty_backward(grad, logits, labels, ctx.top1, kept)
    return gradient, None, None, None


def _fake_misalignment(logits, labels, variant, top1):
    penalty = logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    return penalty, labels.new_empty((), dtype=torch.int64), penalty.new_empty(3, logits.shape[0])


def _setup_cvar(ctx, inputs, output):
    losses, ctx.alpha = inputs
    ctx.save_for_backward(losses, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_cvar(ctx, grad, _):
    if grad is None:
        return None, None
    losses, boundary = ctx.saved_tensors
    return torch.ops.robustft.cvar_backward(grad, losses, ctx.alpha, boundary), None


def _fake_cvar(losses, alpha):
    dtype = accumulation_dtype(losses.dtype)
    return losses.new_empty((), dtype=dtype), losses.new_empty(2, dtype=torch.float64)


def register() -> None:
    fake("vector_exp", contiguous_like)
    fake("group_sums", _fake_sums)
    differentiable(
        "group_risk",
        (_group_risk, _fake_group_risk),
        (_setup_group_risk, _backward_group_risk),
        (_group_risk_gradient, _fake_group_risk_gradient),
    )
    differentiable(
        "misalignment_penalty",
        (None, _fake_misalignment),
        (_setup_misalignment, _backward_misalignment),
        (None, lambda grad, logits, *_: contiguous_like(logits)),
    )
    differentiable(
        "cvar",
        (None, _fake_cvar),
        (_setup_cvar, _backward_cvar),
        (None, lambda grad, losses, *_: contiguous_like(losses)),
    )
