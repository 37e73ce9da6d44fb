"""orthogonality_penalty, forward and backward: ||W^T W - I||_F of a projection W (N, D).

Least work: half of the symmetric W^T W and one product with it, 3 N D^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .work import Candidate, Row, Work, forward_backward, generator, ours, peer

SHAPES = ((768, 512), (1024, 768))


def inputs(row: Row) -> tuple[Tensor]:
    return ((torch.randn(row.n, row.d, generator=generator(row)) / row.n**0.5).requires_grad_(),)


def eager(w: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(w.T @ w - torch.eye(w.shape[1], dtype=w.dtype))


def reference(w: Tensor) -> tuple[Tensor, ...]:
    return forward_backward(eager)(w.detach().double().requires_grad_())


def candidates(row: Row) -> list[Candidate]:
    return [ours("orthogonality_penalty", row, forward_backward), peer("eager", row, forward_backward(eager))]


WORK = Work(
    "orthogonality",
    rows=tuple(Row("orthogonality", n, d) for n, d in SHAPES),
    quick=(Row("orthogonality", 768, 512),),
    inputs=inputs,
    candidates=candidates,
    reference=reference,
    flops=lambda row: 3 * row.n * row.d**2,
    formula="3 N D^2",
)


def test_orthogonality(race, row):
    race(WORK, row)
