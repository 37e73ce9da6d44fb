"""What the quickstart and the study do unless told otherwise. Loads nothing heavy: the command line reads it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How one method is trained: the method's class, its own options, and the loop's."""

    method: str
    lr: float
    epochs: int = 10
    batch_size: int = 128
    weight_decay: float = 0.1
    warmup: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)


# CaRot's teacher: every 2 of 70 steps is as large a part of the run as the paper's every 500 of 25,030.
RECIPES = {
    "FT": Recipe("FineTune", lr=3e-3),
    "FLYP": Recipe("FLYP", lr=3e-3),
    "CaRot": Recipe("CaRot", lr=3e-3, options={"ema_interval": 2}),
}
QUICK_EPOCHS = 4

SEEDS = (0, 1, 2)
"""Of the study."""
