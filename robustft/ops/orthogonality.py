"""The orthogonality penalty of W (P, D) in plain torch, its gradient by one product instead of autograd's two.

    R = W^T W - I,  f = ||R||_F          df/dW = 2 W R / ||R||, 0 where R is 0
                    f = ||R||_F^2        df/dW = 4 W R

Autograd of the formula multiplies W by df/dR and by its transpose. R being symmetric, so is df/dR, and both products
are one. On a GPU these two products of matrices are all its time, and this is what computes it there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops.reference import widen


def orthogonality(w: Tensor, squared: bool) -> Tensor:
    """f, 0-d, of a floating W, in float32 or float64. Can be differentiated any number of times."""
    return _Orthogonality.apply(widen(w), squared)[0]


def gradient(g: Tensor, w: Tensor, squared: bool, residual: Tensor | None = None) -> Tensor:
    """g df/dW in W's dtype; without a residual it is computed, and then differentiable."""
    wide = widen(w)
    if residual is None:
        residual = _residual(wide)
    if squared:
        return ((4 * g) * (wide @ residual)).to(w.dtype)
    norm = torch.linalg.vector_norm(residual)
    return ((2 * g / torch.where(norm == 0, torch.inf, norm)) * (wide @ residual)).to(w.dtype)


def _residual(w: Tensor) -> Tensor:
    return w.T @ w - torch.eye(w.shape[1], dtype=w.dtype, device=w.device)


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
        residual = _residual(w)
        norm = residual.square().sum() if squared else torch.linalg.vector_norm(residual)
        return norm, residual

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
        return gradient(g, w, ctx.squared, None if torch.is_grad_enabled() else residual), None
