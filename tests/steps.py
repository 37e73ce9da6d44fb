"""The same step of two trainings, one of which restates the other."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def step_each(*trainings: tuple[Optimizer, Tensor]) -> None:
    """A step of each optimiser along the gradient of its loss."""
    for optimizer, loss in trainings:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
