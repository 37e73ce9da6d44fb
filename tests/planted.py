"""Test inputs: unit features with a planted positive margin, as a trained CLIP gives them. Never `torch.rand`, whose
all-positive rows hide most errors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def pairs(n: int, d: int, *, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two (n, d) float64 sets of unit rows; row i of one is near row i of the other."""
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    x = normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    t = x + noise * normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    return x, normalize(t, dim=1)
