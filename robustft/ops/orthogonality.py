"""The orthogonality penalty of W (P, D), and its gradient by one product instead of autograd's two.

    R = W^T W - I,  f = ||R||_F          df/dW = 2 W R / ||R||, 0 where R is 0
                    f = ||R||_F^2        df/dW = 4 W R

Autograd of the formula multiplies W by df/dR and by its transpose. R being symmetric, so is df/dR, and both products
are one. Plain torch on any device: three products of matrices, now two, are all its time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality(w: Tensor, squared: bool) -> Tensor:
    """f, 0-d, of float32 or float64 W. Can be differentiated any number of times."""
    return _Orthogonality.apply(w, squared)[0]


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
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn: R depends on W
            residual = _residual(w)
        if ctx.squared:
            return (4 * g) * (w @ residual), None
        norm = torch.linalg.vector_norm(residual)
        return (2 * g / torch.where(norm == 0, torch.inf, norm)) * (w @ residual), None
