"""A run under way: its steps, validations, records and checkpoints, in the order in which they happen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from robustft.data.seeds import stateless_seed
from robustft.data.sources import Source, to_device
from robustft.methods.base import Method, Step
from robustft.ops.processes import Processes, together
from robustft.training.adamw import values_of
from robustft.training.guards import deferred_interrupt, own_generators
from robustft.training.optimization import Optimization
from robustft.training.progress import Clock, Progress
from robustft.training.reporting import OnRecord, Record, peak_memory
from robustft.training.run import Run
from robustft.training.schedule import Schedule
from robustft.training.validation import Validation


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or NaN, at `step` (from 0), in the terms or parameters `names`."""

    def __init__(self, message: str, step: int, names: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.names = names

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int, list[str]]]:
        return type(self), (str(self), self.step, self.names)


class Told:
    """Numbers of a step on their way from the device: (loss, norm of the gradient), and of which step they are."""

    def __init__(self, step: int, out: Step, norm: Tensor) -> None:
        self.step, self.out = step, out
        numbers = torch.stack([out.loss.detach().double(), norm.double()])
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers = numbers

    def read(self) -> tuple[float, float]:
        """Waits for this step, and for no later one."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm = self._numbers.tolist()
        return loss, norm


@dataclass
class Training:
    """A run under way: `step` steps are done, `records` are what was logged of them."""

    method: Method
    source: Source
    schedule: Schedule
    optimization: Optimization
    towers: AbstractContextManager[object]  # held while loss and gradients are computed
    validation: Validation | None
    run: Run | None
    processes: Processes
    shown: Progress
    on_record: OnRecord | None
    log_every: int
    step: int
    records: list[Record]

    def __post_init__(self) -> None:
        self.kept: dict[str, Tensor] = {}  # the best weights of a run without output
        self.clock = Clock(self.step)
        self.told: Told | None = None  # of the last step, if it was not looked at yet
        self.loss = self.norm = math.nan  # of the last step that was looked at

    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.step >= self.schedule.total or self.validation is not None and self.validation.exhausted

    def steps(self, workers: int) -> None:
        """All that are left, with a checkpoint after each epoch; KeyboardInterrupt after the step of a Ctrl-C."""
        if self.over():
            return
        schedule, device = self.schedule, self.optimization.device
        self.method.train()
        with own_generators(device), deferred_interrupt() as interrupted:
            batches = self.source.batches(
                schedule.batches(self.step, self.processes),
                seed=schedule.settings.seed,
                workers=workers,
                pinned=device.type == "cuda",
            )
            for batch in batches:
                self.one_step(batch)
                if self.validation is not None and self.validation.due(self.step, schedule.total):
                    self.look()
                    self.validate(self.validation)
                stop = self.processes.any(bool(interrupted), device)
                if stop or self.over() or self.step % schedule.per_epoch == 0:
                    self.look()
                    if self.run is not None:
                        self.run.save(self.step)
                if stop:
                    saved = "nothing was saved: no output" if self.run is None else f"resume from {self.run.checkpoint}"
                    raise KeyboardInterrupt(f"stopped after step {self.step} of {schedule.total}; {saved}")
                if self.over():
                    break

    def one_step(self, batch: Any) -> None:
        optimization, settings = self.optimization, self.schedule.settings
        rate, epoch = self.schedule.rate(self.step), self.step // self.schedule.per_epoch
        torch.manual_seed(stateless_seed(settings.seed, "step", self.step))
        optimization.start()
        with self.towers:
            out = optimization.backward(batch if optimization.how.parts > 1 else to_device(batch, optimization.device))
        norm = optimization.norm()
        self.look()
        self.told = Told(self.step, out, norm)
        due = (self.step + 1) % self.log_every == 0 or self.step + 1 in (1, self.schedule.total)
        if due or optimization.waits:
            self.look()
        optimization.apply(out.loss, norm, rate)
        self.step += 1
        self.shown.update(self.step, f"epoch {epoch + 1}/{settings.epochs}", f"loss {self.loss:.4f}")
        if due:
            terms = {name: value.item() for name, value in out.terms.items()}
            # None where fp16 skipped the update: JSON has no word for infinity.
            shown = {"gradient_norm": None if optimization.skipped else self.norm}
            if optimization.logit_scale is not None:
                shown["logit_scale"] = math.exp(optimization.logit_scale.item())
            speed = self.clock.rate(self.step) * min(settings.batch_size, self.schedule.samples)
            self.record(
                {"step": self.step, "epoch": epoch + 1, "lr": rate, "loss": self.loss, **terms, **shown},
                {"samples_per_second": speed, **peak_memory(optimization.device)},
            )

    def look(self) -> None:
        """Loss and norm of the last step, if they were not looked at; NonFiniteError where they would spoil weights."""
        told, self.told = self.told, None
        if told is None:
            return
        self.loss, self.norm = told.read()
        if not self.optimization.accepts(self.loss, self.norm):
            epoch = told.step // self.schedule.per_epoch
            checkpoint = None if self.run is None else self.run.checkpoint
            raise _non_finite(self.method, told.out, told.step, epoch, checkpoint, there=told.step == self.step)

    def validate(self, validation: Validation) -> None:
        """Measures, and keeps the weights if they are the best so far."""
        with self.clock.stopped(), together(self.processes):
            measures = validation.measure(self.step)
            better = validation.judge(self.step, measures)
            if better and self.run is not None:
                self.run.save_best(self.step, measures)
            elif better:
                self.kept = {name: value.to("cpu", copy=True) for name, value in self.method.state_dict().items()}
        epoch = (self.step - 1) // self.schedule.per_epoch + 1
        finite = {name: value if math.isfinite(value) else None for name, value in measures.items()}
        self.record({"step": self.step, "epoch": epoch, **finite})
        told = f"{validation.name} {measures[f'validation_{validation.name}']:.4f}"
        self.shown.say(f"step {self.step}/{self.schedule.total}, validation {told}{', the best so far' * better}")

    def restore_best(self) -> None:
        """Gives the method the weights that were best on the validation set, if there is one."""
        best = None if self.validation is None else self.validation.best
        if best is None or best.step == self.step:
            return
        if self.run is None:
            self.method.load_state_dict(self.kept)
        else:
            self.run.load_best(best.step)

    def record(self, record: Record, beside: Mapping[str, float] = MappingProxyType({})) -> None:
        """Keeps a record, and tells it with what is `beside` it: what differs between runs that are equal."""
        self.records.append(record)
        if self.run is not None:
            self.run.append(record)
        if self.on_record is not None:
            self.on_record({**record, **beside})


def _non_finite(
    method: Method, out: Step, step: int, epoch: int, checkpoint: Path | None, there: bool
) -> NonFiniteError:
    """there: whether the gradients are still that step's."""
    terms = [name for name, value in out.terms.items() if not value.isfinite().all()]
    if terms:
        what = f"term {', '.join(repr(name) for name in terms)}"
    elif not out.loss.isfinite():
        terms, what = ["loss"], "the loss"
    else:
        named = method.named_parameters()
        terms = [name for name, p in named if there and p.grad is not None and not values_of(p.grad).isfinite().all()]
        what = f"the gradient of {terms[0]} and {len(terms) - 1} other parameters" if terms else "the gradient's norm"
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in out.terms.items())
    kept = "no checkpoint was written" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
    return NonFiniteError(
        f"step {step} (epoch {epoch + 1}): {what} is not finite ({values}). Stopped before the update; "
        f"{kept}. A lower learning rate, gradient clipping or bf16 instead of fp16 usually helps",
        step,
        terms,
    )
