"""cvar, forward and backward: the mean of the worst tenth of N losses. No products."""

from __future__ import annotations

import torch
from torch import Tensor

from . import bar
from .work import Candidate, Row, Work, forward_backward, generator, ours, peer

SIZES = (512, 32768, 1_048_576)
ALPHA = 0.1


def inputs(row: Row) -> tuple[Tensor]:
    return (torch.randn(row.n, generator=generator(row)).exp().requires_grad_(),)


def eager(losses: Tensor) -> Tensor:
    """With alpha N not whole, the next loss counts with the remainder."""
    budget = ALPHA * len(losses)
    whole = int(budget)
    worst = losses.topk(whole + 1).values
    return (worst[:whole].sum() + (budget - whole) * worst[whole]) / budget


def reference(losses: Tensor) -> tuple[Tensor, ...]:
    return forward_backward(eager)(losses.detach().double().requires_grad_())


def candidates(row: Row) -> list[Candidate]:
    return [
        ours("cvar", row, lambda f: forward_backward(lambda losses: f(losses, ALPHA))),
        peer("eager", row, forward_backward(eager)),
    ]


WORK = Work(
    "cvar",
    rows=(*bar.rows("cvar"), *(Row("cvar", n, 0) for n in SIZES)),
    quick=(Row("cvar", 32768, 0),),
    inputs=inputs,
    candidates=candidates,
    reference=reference,
    flops=lambda row: 0,
    formula="none",
)


def test_cvar(race, row):
    race(WORK, row)
