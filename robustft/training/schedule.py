"""How long a run is, which samples each step sees and at which rate.

    lr(t) = lr (t + 1) / w                              for t < w = round(warmup T)
    lr(t) = lr (1 + cos(pi (t - w) / (T - w))) / 2      after it; T steps in all

Every epoch is a new permutation, a function of (seed, epoch), cut into whole batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from robustft.data.seeds import stateless_generator
from robustft.machine import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What a run is configured by, beside its method and data; one that resumes it must have the same."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    clip: float | None
    precision: Precision
    seed: int
    limit_batches: int | None
    max_logit_scale: float | None

    def __post_init__(self) -> None:
        check_arguments(**asdict(self))


@dataclass(frozen=True)
class Schedule:
    """The steps of a run over so many samples."""

    settings: Settings
    samples: int

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.samples, self.settings.batch_size, self.settings.limit_batches)

    @property
    def total(self) -> int:
        return self.settings.epochs * self.per_epoch

    def chunks(self, epoch: int, done: int) -> Sequence[Tensor]:
        """The indices of each batch of an epoch, of which so many are done."""
        order = torch.randperm(self.samples, generator=stateless_generator(self.settings.seed, "order", epoch))
        return order[: self.per_epoch * self.settings.batch_size].split(self.settings.batch_size)[done:]

    def rate(self, step: int) -> float:
        return learning_rate(step, self.total, self.settings.lr, self.settings.warmup)


def steps_per_epoch(samples: int, batch_size: int, limit_batches: int | None = None) -> int:
    """Batches in an epoch: the whole ones, or a short one where there are too few samples for any."""
    steps = max(1, samples // batch_size)
    return steps if limit_batches is None else min(steps, limit_batches)


def learning_rate(step: int, total: int, lr: float, warmup: float) -> float:
    """The rate of a step in [0, total): up over round(warmup * total) steps, then a cosine down to 0."""
    rising = round(warmup * total)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2


def check_arguments(**arguments: Any) -> None:
    """ValueError if one of `fit`'s arguments, of those that are given, is out of range."""
    for name in ("epochs", "batch_size", "log_every", "limit_batches"):
        value = arguments.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("lr", "clip", "max_logit_scale"):
        value = arguments.get(name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not (weight_decay := arguments.get("weight_decay", 0.0)) >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if not 0 <= (warmup := arguments.get("warmup", 0.0)) < 1:
        raise ValueError(f"warmup is a fraction of all steps and must lie in [0, 1), got {warmup}")
    if (precision := arguments.get("precision", "fp32")) not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
