"""dual_risk, forward and backward: cross-entropy under two heads of class embeddings.

    L = mean_i [-log softmax(s x w^T)_iy - sum_k q_ik log softmax(s x v^T)_ik]

with gradients of x (N, D), w and v (K, D) and s; q (N, K) soft labels. Least work: two logits and four gradient
products, 12 N K D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import normalize

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
    unit_rows,
)

SIZES = (1024, 2048, 8192, 16384, 32768)
CLASSES = (10, 100, 10_000)


def inputs(row: Row) -> tuple[Tensor, ...]:
    rng = generator(row)
    x, w, y = class_samples(rng, row.n, row.k, row.d)
    v = normalize(w + unit_rows(rng, row.k, row.d), dim=1)
    q = (10 * x @ v.T).softmax(1).to(getattr(torch, row.dtype))
    return leaf(x, row), leaf(w, row), leaf(v, row), y, q, scale()


def eager(x: Tensor, w: Tensor, v: Tensor, y: Tensor, q: Tensor, s: Tensor) -> Tensor:
    return F.cross_entropy(s * x @ w.T, y) + F.cross_entropy(s * x @ v.T, q)


def widened(x: Tensor, w: Tensor, v: Tensor, y: Tensor, q: Tensor, s: Tensor) -> Tensor:
    empirical = reference.class_cross_entropy(reference.class_logits(x, w, s, None), y, 0.0)
    return (empirical + reference.soft_cross_entropy(reference.class_logits(x, v, s, None), q)).mean()


def chunked(x: Tensor, w: Tensor, v: Tensor, y: Tensor, q: Tensor, s: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    z = s * x
    return F.linear_cross_entropy(z, w, y, options=options) + F.linear_cross_entropy(z, v, q, options=options)


def candidates(row: Row) -> list[Candidate]:
    def both(function: Callable[..., tuple[Tensor, Tensor]]):
        def total(*arguments: Tensor, **options: int) -> Tensor:
            empirical, worst_case = function(*arguments, **options)
            return empirical + worst_case  # not sum(), which begins by adding 0

        return forward_backward(total)

    found = [
        ours("dual_risk", row, both),
        peer("eager", row, forward_backward(eager), matrices=8),
    ]
    if row.n > 512:
        found.insert(1, panel("dual_risk", row, both))
    if row in bar.rows("dual_risk") and row.n > 512:
        absent = "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"
        found += [
            compiled(eager, row, matrices=8),
            peer("torch chunked", row, forward_backward(chunked), missing=absent),
        ]
    return found


WORK = Work(
    "dual_risk",
    rows=(
        *bar.rows("dual_risk"),
        *(Row("dual_risk", n, k=1000) for n in SIZES),
        *(Row("dual_risk", 4096, k=k) for k in CLASSES),
    ),
    quick=bar.rows("dual_risk", quick=True),
    inputs=inputs,
    candidates=candidates,
    reference=forward_backward(widened),
    flops=lambda row: 12 * row.n * row.k * row.d,
    formula="12 N K D",
)


def test_dual_risk(race, row):
    race(WORK, row)
