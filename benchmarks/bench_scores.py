"""concept_scores: every OOD score of a set of images at once, no gradients.

    c = x w^T,   p = softmax(s c)
    max_k c,   max_k softmax(c),   max_k p,   logsumexp(s c) / s,   sum_k p log p,   argmax_k c

Least work: one product, 2 N K D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import robustft

from . import bar
from .work import SCALE, Candidate, Row, Work, class_samples, compiled, forward, generator, ours, peer

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CLASSES = (10, 100, 10_000)
DIMENSIONS = (128, 1024)


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    x, w, _ = class_samples(generator(row), row.n, row.k, row.d)
    return x.to(getattr(torch, row.dtype)), w.to(getattr(torch, row.dtype))


def scores(function: Callable[..., tuple[Tensor, ...]]):
    return forward(lambda x, w: function(x, w, logit_scale=SCALE))


def reference(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    with robustft.backend("reference"):
        return scores(robustft.functional.concept_scores)(x.float(), w.float())


def eager(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    c = x @ w.T
    z = SCALE * c
    log_p = z.log_softmax(1)
    p = log_p.exp()
    highest, prediction = c.max(1)
    energy = z.logsumexp(1) / SCALE
    return highest, c.softmax(1).amax(1), p.amax(1), energy, (p * log_p).sum(1), prediction


def candidates(row: Row) -> list[Candidate]:
    found = [ours("concept_scores", row, scores), peer("eager", row, forward(eager), matrices=6)]
    if row in bar.rows("scores") and row.n > 512 and row.dtype == "float32":
        found.append(compiled(eager, row, forward, matrices=6))
    return found


WORK = Work(
    "scores",
    rows=(
        *bar.rows("scores"),
        *(Row("scores", n, k=1000) for n in SIZES),
        *(Row("scores", 8192, k=k) for k in CLASSES),
        *(Row("scores", 8192, d, 1000) for d in DIMENSIONS),
    ),
    quick=(*bar.rows("scores", quick=True), Row("scores", 2048, k=1000)),
    inputs=inputs,
    candidates=candidates,
    reference=reference,
    flops=lambda row: 2 * row.n * row.k * row.d,
    formula="2 N K D",
)


def test_scores(race, row):
    race(WORK, row)
