"""Sums of losses by group: d sums_g / d values_i = [groups_i = g]."""

from __future__ import annotations

import torch

from robustft.ops.native.registration import accumulation_dtype, autograd, fake


def _setup(ctx, inputs, output):
    values, groups, _ = inputs
    ctx.dtype = values.dtype
    ctx.save_for_backward(groups)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    (groups,) = ctx.saved_tensors
    return grad[groups].to(ctx.dtype), None, None


def _fake(values, groups, num_groups):
    sums = values.new_empty(num_groups, dtype=accumulation_dtype(values.dtype))
    return sums, groups.new_empty(num_groups, dtype=torch.int64)


def register() -> None:
    fake("vector_exp", lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
    fake("group_sums", _fake)
    autograd("group_sums", _setup, _backward)
