"""How long a run is, which samples each step sees and at which rate.

    lr(t) = lr (t + 1) / w                              for t < w = round(warmup T); after it, T steps in all,
    lr(t) = lr (1 + cos(pi (t - w) / (T - w))) / 2      "cosine"
            lr (1 - (t - w) / (T - w))                  "linear"
            lr                                          "constant"

Every epoch is a new permutation, a function of (seed, epoch), cut into whole batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustft.data.seeds import stateless_generator
from robustft.machine import DECAYS, Decay, Precision
from robustft.ops.processes import ALONE, Processes

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
    schedule: Decay

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

    @property
    def rising(self) -> int:
        """Steps of the warm-up."""
        return round(self.settings.warmup * self.total)

    def batches(self, done: int, processes: Processes = ALONE) -> Iterator[tuple[int, Tensor]]:
        """The epoch and the indices of each batch that is left when so many are done; of several processes, this
        one's part of each."""
        size = self.settings.batch_size
        for epoch in range(done // self.per_epoch, self.settings.epochs):
            order = torch.randperm(self.samples, generator=stateless_generator(self.settings.seed, "order", epoch))
            first = done % self.per_epoch if epoch == done // self.per_epoch else 0
            for chunk in order[: self.per_epoch * size].split(size)[first:]:
                yield epoch, chunk.tensor_split(processes.count)[processes.rank]

    def rate(self, step: int) -> float:
        return learning_rate(step, self.total, self.settings.lr, self.settings.warmup, self.settings.schedule)

    def why_not_after(self, before: Mapping[str, Any]) -> str | None:
        """Why steps done under settings of another length are none of this run; None where they had the same rates."""
        if self.settings.schedule != "constant":
            return (
                f"A {self.settings.schedule} schedule falls over all steps, so those that are done had other rates: "
                "resume with the settings that were, which changes nothing in a finished run, and train the method on "
                'in another output; or train with schedule="constant", which can be continued'
            )
        rose = replace(self, settings=replace(self.settings, epochs=before["epochs"], warmup=before["warmup"])).rising
        if rose != self.rising:
            return (
                f"The rate rose over {rose} steps, which {self.settings.warmup} of {self.total} are not: "
                f"pass warmup={rose / self.total:.6g}"
            )
        return None


def steps_per_epoch(samples: int, batch_size: int, limit_batches: int | None = None) -> int:
    """Batches in an epoch: the whole ones, or a short one where there are too few samples for any."""
    steps = max(1, samples // batch_size)
    return steps if limit_batches is None else min(steps, limit_batches)


def learning_rate(step: int, total: int, lr: float, warmup: float, schedule: Decay = "cosine") -> float:
    """The rate of a step in [0, total): up over round(warmup * total) steps, then down to 0 or not, as `schedule`."""
    rising = round(warmup * total)
    if step < rising:
        return lr * (step + 1) / rising
    match schedule:
        case "cosine":
            return lr * (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        case "linear":
            return lr * (1 - (step - rising) / (total - rising))
        case "constant":
            return lr


def check_arguments(**arguments: Any) -> None:
    """ValueError if one of `fit`'s arguments, of those that are given, is out of range."""
    for name in ("epochs", "batch_size", "accumulate", "log_every", "limit_batches", "patience"):
        value = arguments.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("lr", "clip", "max_logit_scale", "validate_every"):
        value = arguments.get(name)
        finite = name in ("lr", "validate_every")
        if value is not None and not (value > 0 and (not finite or value < math.inf)):
            raise ValueError(f"{name} must be positive{' and finite' * finite}, got {value}")
    if not (weight_decay := arguments.get("weight_decay", 0.0)) >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if not 0 <= (warmup := arguments.get("warmup", 0.0)) < 1:
        raise ValueError(f"warmup is a fraction of all steps and must lie in [0, 1), got {warmup}")
    for name, known in (("precision", tuple(DTYPES)), ("schedule", DECAYS)):
        if (choice := arguments.get(name, known[0])) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {choice!r}")
