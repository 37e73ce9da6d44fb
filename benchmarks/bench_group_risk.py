"""group_risk, forward and backward: mean loss of each of K groups, and the worst of them. No products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import bar
from .work import Candidate, Row, Work, forward_backward, generator, ours, peer

SIZES = (512, 32768, 1_048_576)


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    rng = generator(row)
    losses = torch.randn(row.n, generator=rng).exp().requires_grad_()
    return losses, torch.randint(row.k, (row.n,), generator=rng)


def candidates(row: Row) -> list[Candidate]:
    def total(function: Callable[..., tuple[Tensor, Tensor, Tensor]]):
        def loss(losses: Tensor, groups: Tensor) -> Tensor:
            mean, worst, _ = function(losses, groups, row.k)
            return mean.sum() + worst

        return forward_backward(loss)

    return [ours("group_risk", row, total), peer("eager", row, total(eager))]


def eager(losses: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.bincount(groups, minlength=num_groups)
    mean = losses.new_zeros(num_groups).index_add(0, groups, losses) / counts.clamp(min=1)
    return mean, mean.max(), counts


def reference(losses: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
    def loss(wide: Tensor) -> Tensor:
        mean, worst, _ = eager(wide, groups, int(groups.max()) + 1)
        return mean.sum() + worst

    return forward_backward(loss)(losses.detach().double().requires_grad_())


WORK = Work(
    "group_risk",
    rows=(*bar.rows("group_risk"), *(Row("group_risk", n, 0, 16) for n in SIZES)),
    quick=(Row("group_risk", 32768, 0, 16),),
    inputs=inputs,
    candidates=candidates,
    reference=reference,
    flops=lambda row: 0,
    formula="none",
)


def test_group_risk(race, row):
    race(WORK, row)
