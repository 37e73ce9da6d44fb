"""misalignment_penalty, forward and backward, on logits (N, K) that exist already. No products."""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops import reference

from .work import SCALE, Candidate, Row, Work, class_samples, forward_backward, generator, ours, peer

SIZES = (512, 4096, 32768)


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    x, w, y = class_samples(generator(row), row.n, row.k, 128)
    return (SCALE * x @ w.T).requires_grad_(), y


def eager(z: Tensor, y: Tensor) -> Tensor:
    label = z.gather(1, y[:, None])
    above = z > label
    wrong = above.any(1, keepdim=True)
    highest = z.masked_fill(~(above | ~wrong), -torch.inf).logsumexp(1, keepdim=True)
    return ((highest - label) * wrong).mean()


def candidates(row: Row) -> list[Candidate]:
    return [
        ours("misalignment_penalty", row, forward_backward),
        peer("eager", row, forward_backward(eager), matrices=6),
    ]


WORK = Work(
    "misalignment",
    rows=tuple(Row("misalignment", n, 0, 1000) for n in SIZES),
    quick=(Row("misalignment", 4096, 0, 1000),),
    inputs=inputs,
    candidates=candidates,
    reference=forward_backward(lambda z, y: reference.misalignment(z, y, "neg_log_ratio", False).mean()),
    flops=lambda row: 0,
    formula="none",
)


def test_misalignment(race, row):
    race(WORK, row)
