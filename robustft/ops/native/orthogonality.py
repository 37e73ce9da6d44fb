"""Autograd of the orthogonality penalty: compiled on the CPU (csrc/cpu/orthogonality.cpp), composed of torch elsewhere.

Unlike the losses on a batch it can be differentiated again, as regularisers are: then the composed form is.
"""

from __future__ import annotations

import torch

from robustft.ops import orthogonality as composed
from robustft.ops.native.registration import accumulation_dtype, call, contiguous_like, differentiable


def orthogonality_penalty(w, squared):
    return call("orthogonality_penalty", w, squared)[0]


def _setup(ctx, inputs, output):
    w, ctx.squared = inputs
    penalty, residual = output
    ctx.save_for_backward(w, residual, penalty)
    ctx.mark_non_differentiable(residual)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return None, None
    w, residual, penalty = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
        return composed.gradient(grad, w, ctx.squared), None
    return torch.ops.robustft.orthogonality_penalty_backward(grad, w, residual, penalty, ctx.squared), None


def _fake(w, squared):
    penalty = w.new_empty((), dtype=accumulation_dtype(w.dtype))
    return penalty, penalty.new_empty(w.shape[1], w.shape[1])


def register() -> None:
    differentiable(
        "orthogonality_penalty",
        (None, _fake),
        (_setup, _backward),
        (None, lambda grad, w, *_: contiguous_like(w)),
    )
