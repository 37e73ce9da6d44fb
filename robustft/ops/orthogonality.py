"""The orthogonality penalty of W (P, D): compiled on the CPU (csrc/cpu/orthogonality.cpp), elsewhere in plain torch.

    R = W^T W - I,  f = ||R||_F          df/dW = 2 W R / ||R||, 0 where R is 0
                    f = ||R||_F^2        df/dW = 4 W R

Autograd of the formula multiplies W by df/dR and by its transpose. R being symmetric, so is df/dR, and both products
are one. On a GPU these two products of matrices are all its time, and the composed form is what computes it there.
Unlike the losses on a batch the penalty can be differentiated again, as regularisers are: then the composed form is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustft.ops import registry
from robustft.ops.dispatch import body_of
from robustft.ops.precision import at_least_float32
from robustft.ops.registry import (
    Backward,
    Call,
    Op,
    Source,
    accumulation_dtype,
    call,
    contiguous_like,
    gradient,
    register,
)


def orthogonality_penalty(w: Tensor, squared: bool) -> Tensor:
    """f, 0-d, of a floating W, in float32 or float64. Can be differentiated any number of times."""
    if w.is_cpu and body_of("orthogonality_penalty", w) != "reference":
        return call("orthogonality_penalty", w, squared)[0]
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _penalty(_residual(at_least_float32(w)), squared)  # torch.func transforms no autograd.Function like ours
    return _Composed.apply(at_least_float32(w), squared)[0]


def _penalty(residual: Tensor, squared: bool) -> Tensor:
    return residual.square().sum() if squared else torch.linalg.vector_norm(residual)


def _gradient(g: Tensor, w: Tensor, squared: bool, residual: Tensor | None = None) -> Tensor:
    """g df/dW in W's dtype; without a residual it is computed, and then differentiable."""
    wide = at_least_float32(w)
    if residual is None:
        residual = _residual(wide)
    if squared:
        return ((4 * g) * (wide @ residual)).to(w.dtype)
    norm = torch.linalg.vector_norm(residual)
    return ((2 * g / torch.where(norm == 0, torch.inf, norm)) * (wide @ residual)).to(w.dtype)


def _residual(w: Tensor) -> Tensor:
    return w.T @ w - torch.eye(w.shape[1], dtype=w.dtype, device=w.device)


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
        residual = _residual(w)
        return _penalty(residual, squared), residual

    @staticmethod
    def setup_context(ctx, inputs, output):
        w, ctx.squared = inputs
        _, residual = output
        ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)  # else the backward would be given zeros for R
        ctx.save_for_backward(w, residual)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return None, None
        w, residual = ctx.saved_tensors
        # Where the gradient is to be differentiated in turn, R depends on W.
        return _gradient(g, w, ctx.squared, None if torch.is_grad_enabled() else residual), None


def _setup(ctx, inputs, output):
    w, ctx.squared = inputs
    penalty, residual = output
    ctx.save_for_backward(w, residual, penalty)
    ctx.mark_non_differentiable(residual)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return None, None
    w, residual, penalty = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
        return _gradient(grad, w, ctx.squared), None
    return gradient("orthogonality_penalty", grad, w, residual, penalty, ctx.squared), None


def _fake(w, squared):
    penalty = w.new_empty((), dtype=accumulation_dtype(w.dtype))
    return penalty, penalty.new_empty(w.shape[1], w.shape[1])


def _sample(source: Source) -> Iterator[tuple]:
    yield from ((source.normal(9, 5, grad=True), squared) for squared in (False, True))


register(
    Op(
        "orthogonality_penalty",
        _fake,
        _sample,
        backward=Backward(_setup, _backward, lambda grad, w, *_: contiguous_like(w)),
        public=lambda source: (Call((w,), {"squared": squared}) for w, squared in _sample(source)),
    )
)
registry.PUBLIC["cross_penalty"] = lambda source: [
    Call((source.normal(9, 5, grad=True), source.normal(7, 5, grad=True)))
]
