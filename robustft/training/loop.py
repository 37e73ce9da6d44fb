"""The optional loop: AdamW, warm-up and cosine, clipping, mixed precision, checkpoints, exact resume.

Whatever is random, the order of the samples, their augmentation, captions and dropout, is a function of
(seed, t), never of a generator's history. So weights, moments, loss scale and t are the whole state of a run,
and one that is killed at any step and resumed ends bit for bit like one that never was (CPU, fp32, same
number of threads).
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustft.clip import check_trainable_precision
from robustft.data.seeds import stateless_seed
from robustft.data.sources import Source, to_device
from robustft.methods.base import Method, Step, check_single_process
from robustft.training.guards import deferred_interrupt, own_generators, restored
from robustft.training.optimization import Optimization
from robustft.training.progress import Progress
from robustft.training.run import Record, Run, opened
from robustft.training.schedule import Precision, Schedule, Settings, check_arguments


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or NaN, at `step` (from 0), in the terms or parameters `names`."""

    def __init__(self, message: str, step: int, names: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.names = names


@dataclass(frozen=True)
class History:
    """What `fit` did: records as in metrics.jsonl, steps done in all, seconds that this call took."""

    records: list[Record]
    steps: int
    seconds: float


def fit(
    method: Method,
    data: Any,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.1,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    max_logit_scale: float | None = 100.0,
    precision: Precision = "fp32",
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    limit_batches: int | None = None,
    dry_run: bool = False,
    device: torch.device | str | None = None,
    workers: int = 0,
    log_every: int = 10,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> History:
    """Train a method: `epochs` times over `data`, then `method.classifier()`.

    Every epoch is a new permutation cut into whole batches; the last short one is left out, because a
    contrastive loss over fewer pairs is another loss. Matrices and embeddings decay; biases, norms and the
    logit scale do not (the papers' code decays all).

    Args:
        method: the method to train; moved to `device` if one is given.
        data: any of what `robustft.data.sources` names. Where it tells its classes' names, all or some of the method's,
            labels are matched to them by name. Augmentation may use torch's, numpy's or Python's global generators:
            each is seeded by (seed, epoch, index).
        epochs, batch_size, lr, weight_decay: as usual.
        warmup: fraction of all steps over which the rate rises.
        clip: largest norm of the whole gradient, after the fp16 loss scale is taken out; None for no limit.
        max_logit_scale: where the model's logit scale is trained, it is held at or below this after each update, as
            open_clip holds it, or at its first value where that is higher; None for no bound. Records have the scale.
        precision: autocast to bf16 or fp16 (with loss scaling); weights stay as they are.
        seed: of order, augmentation and dropout. A method's captions have their own.
        output: folder for metrics.jsonl and checkpoints/, written at the start, after each epoch and on
            Ctrl-C. It must not hold a run.
        resume: continue the run that `output` holds, under the same configuration.
        limit_batches: at most so many batches an epoch.
        dry_run: one batch through everything, then put the method back as it was; nothing is written.
        workers: processes that load a dataset.
        log_every: steps between records.
        progress: a bar on a terminal, else a line every few seconds to `log` (standard error by default).

    Raises:
        NonFiniteError: before the update that would spoil the weights. The last checkpoint stays.
        KeyboardInterrupt: on Ctrl-C, after the current step and its checkpoint. A second Ctrl-C does not
            wait.
        ValueError, TypeError: bad arguments or data, a configuration other than the checkpoint's, or trained weights
            in half precision, in which most updates are lost.
        RuntimeError: under more than one process of torch.distributed.
        FileExistsError, FileNotFoundError, BlockingIOError, OSError: `output` holds a run, has none to
            resume, is in use by another process, or cannot be written.
    """
    started = time.monotonic()
    check_single_process("robustft.fit")
    settings = Settings(
        epochs, batch_size, lr, weight_decay, warmup, clip, precision, seed, limit_batches, max_logit_scale
    )
    check_arguments(log_every=log_every)
    if resume and output is None:
        raise ValueError("resume=True needs output, the folder of the run to continue")
    check_trainable_precision(method)
    if device is not None:
        method.to(device)
    source = Source(data, method.model, name="data", classes=method.classes, of=f"the {type(method).__name__}")
    described = source.check_training(len(method.class_names), method.takes_features)
    with ExitStack() as held:
        if dry_run:
            settings = replace(settings, epochs=1, limit_batches=1)
            held.enter_context(restored(method))
        schedule = Schedule(settings, len(source))
        _begin(method, schedule.total, dry_run)
        optimization = Optimization(method, settings)
        run, step = None, 0
        records: list[Record] = []
        if output is not None:
            held.enter_context(opened(Path(output), resume))
        if output is not None and not dry_run:
            config = {"method": method.config, "data": described, **asdict(settings)}
            run = Run(Path(output), method, optimization, config)
            step, records = run.resume(schedule.total) if resume else run.start()
        report = held.enter_context(Progress(type(method).__name__, schedule.total, step, progress, log))
        training = _Training(method, source, schedule, optimization, run, report, log_every, step, records)
        training.epochs(workers)
    return History(training.records, training.step, time.monotonic() - started)


def _begin(method: Method, total: int, dry_run: bool) -> None:
    """Tells the method how long the run is."""
    if method.total_steps not in (None, total) and not dry_run:
        warnings.warn(
            f"{type(method).__name__} was made for total_steps={method.total_steps}, this run has {total}: "
            "what it schedules over the run will end at another point",
            stacklevel=3,
        )
    method.begin_run(total)


@dataclass
class _Training:
    """A run under way: `step` steps are done, `records` are what was logged of them."""

    method: Method
    source: Source
    schedule: Schedule
    optimization: Optimization
    run: Run | None
    report: Progress
    log_every: int
    step: int
    records: list[Record]

    def epochs(self, workers: int) -> None:
        """All that are left, each with a checkpoint at its end; KeyboardInterrupt after the step of a Ctrl-C."""
        schedule, settings = self.schedule, self.schedule.settings
        self.method.train()
        with own_generators(self.optimization.device), deferred_interrupt() as interrupted:
            for epoch in range(self.step // schedule.per_epoch, settings.epochs):
                chunks = schedule.chunks(epoch, self.step % schedule.per_epoch)
                for batch in self.source.batches(chunks, seed=settings.seed, epoch=epoch, workers=workers):
                    self.one_step(batch, epoch)
                    if interrupted:
                        break
                if self.run is not None:
                    self.run.save(self.step)
                if interrupted:
                    saved = "nothing was saved: no output" if self.run is None else f"resume from {self.run.checkpoint}"
                    raise KeyboardInterrupt(f"stopped after step {self.step} of {schedule.total}; {saved}")

    def one_step(self, batch: Any, epoch: int) -> None:
        optimization, settings = self.optimization, self.schedule.settings
        rate = self.schedule.rate(self.step)
        torch.manual_seed(stateless_seed(settings.seed, "step", self.step))
        optimization.start()
        out = optimization.backward(to_device(batch, optimization.device))
        norm = optimization.norm()
        loss, size = out.loss.item(), norm.item()
        if not optimization.accepts(loss, size):
            raise _non_finite(self.method, out, self.step, epoch, None if self.run is None else self.run.checkpoint)
        optimization.apply(norm, rate)
        self.step += 1
        self.report.update(self.step, f"epoch {epoch + 1}/{settings.epochs}", f"loss {loss:.4f}")
        if self.step % self.log_every == 0 or self.step in (1, self.schedule.total):
            terms = {name: value.item() for name, value in out.terms.items()}
            # None where fp16 skipped the update: JSON has no word for infinity.
            shown = {"gradient_norm": None if optimization.skipped else size}
            if optimization.logit_scale is not None:
                shown["logit_scale"] = math.exp(optimization.logit_scale.item())
            self.record({"step": self.step, "epoch": epoch + 1, "lr": rate, "loss": loss, **terms, **shown})

    def record(self, record: Record) -> None:
        self.records.append(record)
        if self.run is not None:
            self.run.append(record)


def _non_finite(method: Method, out: Step, step: int, epoch: int, checkpoint: Path | None) -> NonFiniteError:
    terms = [name for name, value in out.terms.items() if not value.isfinite().all()]
    if terms:
        what = f"term {', '.join(repr(name) for name in terms)}"
    elif not out.loss.isfinite():
        terms, what = ["loss"], "the loss"
    else:
        named = method.named_parameters()
        terms = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        what = f"the gradient of {terms[0]} and {len(terms) - 1} other parameters" if terms else "the gradient's norm"
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in out.terms.items())
    kept = "no checkpoint was written" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
    return NonFiniteError(
        f"step {step} (epoch {epoch + 1}): {what} is not finite ({values}). Stopped before the update; "
        f"{kept}. A lower learning rate, gradient clipping or bf16 instead of fp16 usually helps",
        step,
        terms,
    )
