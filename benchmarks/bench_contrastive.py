"""contrastive_loss, forward and backward.

    L = 1/2 mean_i [CE(s x t^T, i) + CE(s t x^T, i)],  gradients of x (N, D), t (N, D) and s

Least work: one product for the logits and one for each gradient, 6 N^2 D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.ops import reference

from . import bar
from .work import Candidate, Row, Work, compiled, forward_backward, generator, leaf, ours, pairs, panel, peer, scale

SIZES = (1024, 2048, 4096, 16384, 32768)
DIMENSIONS = (128, 1024)


def inputs(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    x, t = pairs(generator(row), row.n, row.d)
    return leaf(x, row), leaf(t, row), scale()


def eager(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    z = s * x @ t.T
    y = torch.arange(len(x))
    return (F.cross_entropy(z, y) + F.cross_entropy(z.T, y)) / 2


def with_targets(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """robustft's own eager form, which takes any targets and so holds an N x N matrix of them."""
    return reference.contrastive_loss(x, t, s, torch.arange(len(x)), 0.0).mean()


def clip_loss() -> Callable[..., Tensor]:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def chunked(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    y, options = torch.arange(len(x)), torch.nn.LinearCrossEntropyOptions()
    return (
        F.linear_cross_entropy(s * x, t, y, options=options) + F.linear_cross_entropy(s * t, x, y, options=options)
    ) / 2


def candidates(row: Row) -> list[Candidate]:
    found = [
        ours("contrastive_loss", row, forward_backward),
        peer("eager", row, forward_backward(eager), matrices=4),
        peer("open_clip", row, forward_backward(clip_loss()), matrices=4),
    ]
    if row.n > 512:
        found.insert(1, panel("contrastive_loss", row, forward_backward))
    if row in bar.rows("contrastive") and row.n > 512 and row.precision == "highest":
        absent = "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"
        found += [
            peer("robustft reference", row, forward_backward(with_targets), matrices=9),
            compiled(eager, row, matrices=4),
            peer("torch chunked", row, forward_backward(chunked), missing=absent),
        ]
    return found


WORK = Work(
    "contrastive",
    rows=(
        *bar.rows("contrastive"),
        *(Row("contrastive", n) for n in SIZES),
        *(Row("contrastive", 2048, d) for d in DIMENSIONS),
        Row("contrastive", 512, dtype="bfloat16"),
    ),
    quick=(*bar.rows("contrastive", quick=True), Row("contrastive", 1024)),
    inputs=inputs,
    candidates=candidates,
    reference=forward_backward(with_targets),
    flops=lambda row: 6 * row.n**2 * row.d,
    formula="6 N^2 D",
)


def test_contrastive(race, row):
    race(WORK, row)
