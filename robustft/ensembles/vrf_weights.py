"""VRF's weight of a distance, and the choice of its two numbers.

sigmoid   w = 1 / (1 + exp((d - a) / b))
linear    w = clip(1/2 - (d - a) / 4b, 0, 1)          the sigmoid's tangent at a
binary    w = 1 where d <= a, else 0                  b -> 0

a and b are those of the best accuracy of p = w p_ft + (1 - w) p_zs on held-out ID data; of equals, often many, those
that leave the zero-shot model the largest share, and then of the lower NLL. They are sought over

a = l + (a' - 0.4) (h - l) / 1.2,   b = b' (h - l) / 1.2        a' in A_GRID, b' in B_GRID

with l and h the 1st and 99th percentile of the held-out distances. Where these are the paper's 0.4 and 1.6, a B/16's
on ImageNet, a = a' and b = b'; the grids hold the paper's (a 1.2-1.8, b 0.5-1.0) and go beyond it to both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ensembles.vrf_features import VRFFeatures

WEIGHTINGS = ("sigmoid", "linear", "binary")
PAPER_RANGE = (0.4, 1.6)
A_GRID = (0.4, 0.7, 1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.0)
B_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5)

ROWS = 4096  # of logits, held in float64 at a time


class GridPoint(NamedTuple):
    """One (a, b) on the validation set: accuracy, mean weight of the fine-tuned model, mean NLL in nats."""

    a: float
    b: float
    accuracy: float
    weight: float
    nll: float


def weigh(distances: Tensor, a: float, b: float, weighting: str) -> Tensor:
    """w of squared distances (N,), in [0, 1]; `a` may be infinite, then all weights are 0 or 1."""
    match weighting:
        case "binary":
            return (distances <= a).to(distances.dtype)
        case "linear":
            return (0.5 - (distances - a) / (4.0 * b)).clamp(0.0, 1.0)
        case _:
            return torch.sigmoid((a - distances) / b)


def centre(distances: Tensor, alpha: float, b: float, weighting: str) -> float:
    """The a at which the mean weight of these distances is alpha, or first exceeds it; by bisection to rounding."""
    if alpha in (0.0, 1.0):
        return float("inf") if alpha else float("-inf")
    low, high = float(distances.min()) - 40.0 * b - 1.0, float(distances.max()) + 40.0 * b + 1.0
    while low < (middle := 0.5 * (low + high)) < high:
        if float(weigh(distances, middle, b, weighting).mean()) < alpha:
            low = middle
        else:
            high = middle
    return high


def grid(
    distances: Tensor, a: Sequence[float] | None, b: Sequence[float] | None, weighting: str
) -> list[tuple[float, float]]:
    """Every (a, b) to try: those given, else the defaults on the scale of held-out distances (N,)."""
    low, high = distances.double().quantile(torch.tensor([0.01, 0.99]).to(distances.device).double()).tolist()
    scale = (high - low) / (PAPER_RANGE[1] - PAPER_RANGE[0]) or 1.0
    a = a or [low + scale * (value - PAPER_RANGE[0]) for value in A_GRID]
    b = (0.0,) if weighting == "binary" else b or [scale * value for value in B_GRID]
    return list(itertools.product(a, b))


def scores(
    pairs: Sequence[tuple[float, float]],
    validation: VRFFeatures,
    distances: Tensor,
    temperatures: tuple[float, float],
    weighting: str,
) -> tuple[GridPoint, ...]:
    """What every (a, b) scores, in float64; each softmax is taken once. Memory: 4096 rows of three (N, K)."""
    sums = torch.zeros(len(pairs), 3, dtype=torch.float64)
    for part, d in zip(validation.rows(ROWS), distances.double().split(ROWS), strict=True):
        zs = (part.zero_shot.logits.double() / temperatures[0]).softmax(-1)
        ft = (part.fine_tuned.logits.double() / temperatures[1]).softmax(-1)
        labels = part.labels.long()
        for i, (a, b) in enumerate(pairs):
            w = weigh(d, a, b, weighting)
            p = torch.lerp(zs, ft, w[:, None])
            true = p.gather(1, labels[:, None]).clamp_min(torch.finfo(p.dtype).tiny)
            sums[i] += torch.stack([(p.argmax(-1) == labels).double().sum(), w.sum(), -true.log().sum()]).cpu()
    return tuple(
        GridPoint(a, b, *means) for (a, b), means in zip(pairs, (sums / len(validation)).tolist(), strict=True)
    )
