"""The precision that features, logits and losses are computed in outside the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """float64 as it is, half precision as float32; the gradient passes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
