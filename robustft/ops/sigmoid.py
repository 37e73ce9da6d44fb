"""SigLIP's loss over the similarity tiles: every pair of an image and a text is a decision of its own.

z = s x t^T + b,    loss_i = sum_j softplus(-y_ij z_ij),    y = 1 where image and text have the same label, else -1
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops import reference


def contrastive_loss(
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    memory: str | int,
) -> Tensor:
    """The loss of each image, (n,), or reduced, 0-d."""
    of_rows = _indices(labels, x)
    losses = reference.sigmoid_contrastive_loss(x, t, scale, bias, of_rows, of_rows)
    losses = losses if weight is None else losses * weight
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def contrastive_distillation_loss(
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    xt: Tensor,
    tt: Tensor,
    st: Tensor,
    bt: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two (n,): contrastive and distillation."""
    of_rows = _indices(labels, x)
    contrastive = reference.sigmoid_contrastive_loss(x, t, scale, bias, of_rows, of_rows)
    return contrastive, reference.sigmoid_distillation_loss(x, t, scale, bias, xt, tt, st, bt)


def _indices(labels: Tensor | None, x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) if labels is None else labels
