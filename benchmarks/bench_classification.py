"""classification_loss, forward and backward: cross-entropy and the misalignment penalty (CMP).

    z = s x w^T;   L = mean_i [-log softmax(z)_iy + [H_i not empty] (logsumexp_H z - z_iy)],   H_i = {k: z_ik > z_iy}

with gradients of x (N, D), w (K, D) and s. Least work: the logits and two gradients, 6 N K D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from robustft.ops import reference

from . import bar
from .work import (
    Candidate,
    Row,
    Work,
    class_samples,
    compiled,
    forward_backward,
    generator,
    leaf,
    ours,
    panel,
    peer,
    scale,
)

SIZES = (1024, 2048, 8192, 16384, 32768)
CLASSES = (10, 100, 10_000)
DIMENSIONS = (128, 1024)


def inputs(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, y = class_samples(generator(row), row.n, row.k, row.d)
    return leaf(x, row), leaf(w, row), y, scale()


def eager(x: Tensor, w: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = s * x @ w.T
    label = z.gather(1, y[:, None])
    above = z > label
    wrong = above.any(1, keepdim=True)
    highest = z.masked_fill(~(above | ~wrong), -float("inf")).logsumexp(1, keepdim=True)
    return F.cross_entropy(z, y) + ((highest - label) * wrong).mean()


def widened(x: Tensor, w: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = reference.class_logits(x, w, s, None)
    penalty = reference.misalignment(z, y, "neg_log_ratio", False)
    return (reference.class_cross_entropy(z, y, 0.0) + penalty).mean()


def candidates(row: Row) -> list[Candidate]:
    def both(function: Callable[..., tuple[Tensor, Tensor]]):
        def total(*arguments: Tensor, **options: int) -> Tensor:
            cross_entropy, misalignment = function(*arguments, **options)
            return cross_entropy + misalignment  # not sum(), which begins by adding 0

        return forward_backward(total)

    found = [
        ours("classification_loss", row, both),
        peer("eager", row, forward_backward(eager), matrices=9),
    ]
    if row.n > 512:
        found.insert(1, panel("classification_loss", row, both))
    everywhere = (*bar.rows("classification"), *bar.rows("classification", quick=True))
    if row in everywhere and row.n > 512 and row.precision == "highest":
        found += [
            peer("robustft reference", row, forward_backward(widened), matrices=9),
            compiled(eager, row, matrices=9),
        ]
    return found


WORK = Work(
    "classification",
    rows=(
        *bar.rows("classification"),
        *(Row("classification", n, k=1000) for n in SIZES),
        *(Row("classification", 4096, k=k) for k in CLASSES),
        *(Row("classification", 4096, d, 1000) for d in DIMENSIONS),
        Row("classification", 512, k=1000, dtype="bfloat16"),
    ),
    quick=(*bar.rows("classification", quick=True), Row("classification", 4096, k=100)),
    inputs=inputs,
    candidates=candidates,
    reference=forward_backward(widened),
    flops=lambda row: 6 * row.n * row.k * row.d,
    formula="6 N K D",
)


def test_classification(race, row):
    race(WORK, row)
