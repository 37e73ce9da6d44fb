"""The optional loop: AdamW, a schedule of the rate, clipping, mixed precision, validation, checkpoints, exact resume.

Whatever is random, the order of the samples, their augmentation, captions and dropout, is a function of
(seed, t), never of a generator's history. So weights, moments, loss scale, the best validation and t are the whole
state of a run, and one that is killed at any step and resumed ends bit for bit like one that never was (CPU, fp32,
same number of threads).
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from robustft.clip import check_trainable_precision
from robustft.clip.loading import move
from robustft.clip.spread import Spread
from robustft.data.images import Skipped
from robustft.data.sources import Source, check_workers
from robustft.machine import PROCESS_TIMEOUT, WEIGHT_DECAY, CompileMode, Decay, Precision
from robustft.methods.base import Method
from robustft.ops.kinds import checked
from robustft.ops.processes import Processes, joined
from robustft.training.adamw import tables_as_before
from robustft.training.compiling import CompiledTowers
from robustft.training.guards import recomputing, restored
from robustft.training.optimization import Optimization
from robustft.training.progress import Progress
from robustft.training.reporting import OnRecord, Record, closed
from robustft.training.run import Run, differences, opened
from robustft.training.schedule import Schedule, Settings, check_arguments
from robustft.training.steps import Training
from robustft.training.validation import Best, Metric, Validation


@dataclass(frozen=True)
class History:
    """What `fit` did: records as in metrics.jsonl, steps done in all, seconds that this call took; with a validation
    set, the step and the value that were best, and whether patience ended the run; and the images that could not be
    read and that others stood in for."""

    records: list[Record]
    steps: int
    seconds: float
    best: Best | None = None
    stopped_early: bool = False
    skipped: tuple[Skipped, ...] = ()

    @property
    def validations(self) -> list[Record]:
        """The records that are validations."""
        return [record for record in self.records if "validation_accuracy" in record]


@checked
def fit(
    method: Method,
    data: Any,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    accumulate: int = 1,
    weight_decay: float = WEIGHT_DECAY,
    warmup: float = 0.1,
    schedule: Decay = "cosine",
    clip: float | None = 1.0,
    max_logit_scale: float | None = 100.0,
    precision: Precision = "fp32",
    grad_checkpointing: bool = False,
    compile: bool | CompileMode = False,
    seed: int = 0,
    validation: Any = None,
    metric: str | Metric = "accuracy",
    higher_is_better: bool | None = None,
    validate_every: float = 1,
    patience: int | None = None,
    restore_best: bool = True,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    limit_batches: int | None = None,
    dry_run: bool = False,
    device: torch.device | str | None = None,
    workers: int = 0,
    process_timeout: float = PROCESS_TIMEOUT,
    log_every: int = 10,
    on_record: OnRecord | None = None,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> History:
    """Train a method: `epochs` times over `data`, then `method.classifier()`.

    Every epoch is a new permutation cut into whole batches; the last short one is left out, because a
    contrastive loss over fewer pairs is another loss. Matrices and embeddings decay; biases, norms and the
    logit scale do not (the papers' code decays all).

    Under torchrun, or in the processes of a group that is there, all of them train one method, and end with what one
    process would have, to rounding. A batch is the same as on one, and each has a part of its rows: `batch_size` is
    that of them all. The loss is the whole batch's (`Method.forward`), gradients are averaged, and the validation is
    divided. Process 0 writes, shows and calls `on_record`; the weights that it begins with are everyone's. A run may be
    resumed with another number of them.

    Args:
        method: the method to train; moved to `device` if one is given.
        data: any of what `robustft.data.sources` names. Where it tells its classes' names, all or some of the method's,
            labels are matched to them by name. Augmentation may use torch's, numpy's or Python's global generators:
            each is seeded by (seed, epoch, index).
        epochs, batch_size, lr, weight_decay: as usual.
        accumulate: so many parts of a batch go through the towers one after the other. The step is that of the whole
            batch, for contrastive losses too (`Method.forward`), in the memory of one part. A run may be resumed with
            another number: it is the same to rounding, and without dropout.
        warmup: fraction of all steps over which the rate rises.
        schedule: of the rate after that: "cosine" or "linear", down to 0 over the steps that are left, or "constant".
        clip: largest norm of the whole gradient, after the fp16 loss scale is taken out; None for no limit.
        max_logit_scale: where the model's logit scale is trained, it is held at or below this after each update, as
            open_clip holds it, or at its first value where that is higher; None for no bound. Records have the scale.
        precision: autocast to bf16 or fp16 (with loss scaling); weights stay as they are.
        grad_checkpointing: towers compute their activations once more in the backward: the same gradients, in less
            memory and more time.
        compile: torch.compile makes the code of the towers' blocks, in the first step: True, or one of its modes,
            "reduce-overhead" for CUDA graphs of image towers. `robustft.training.CompiledTowers` says what stays as it
            is. A run may be resumed with another choice: it is the same to rounding, and without dropout.
        seed: of order, augmentation and dropout. A method's captions have their own.
        validation: a held-out set, any of what `robustft.evaluate` takes, or features where `data` are features. It is
            measured in float32 and changes nothing in the training; `robustft.training.validation` says what records
            have of it. The weights that were best are kept in checkpoints/best/, without `output` in memory.
        metric: what is best: "accuracy", "ece", "nll", "worst_group" (accuracy, where the set has groups), or a
            function from the `Outputs` on the whole set to a number.
        higher_is_better: of a metric that is a function.
        validate_every: epochs, or parts of one, from one validation to the next. The last step has one too.
        patience: so many validations without a better value end the training.
        restore_best: leave the method with the weights that were best, in the end, rather than the last ones.
        output: folder for metrics.jsonl and checkpoints/, written at the start, after each epoch and on
            Ctrl-C. It must not hold a run.
        resume: continue the run that `output` holds, under the same configuration. Only `epochs`, and `warmup` so that
            it takes as many steps as before, may change, where the steps that are done would have been the same: with
            a constant rate, and a method without a schedule over the run. `patience` may change too.
        limit_batches: at most so many batches an epoch.
        dry_run: one batch through everything, then put the method back as it was; nothing is written or reported.
        workers: processes that load a dataset, the same ones in all epochs. Training is the same, in every bit, with
            any number of them. 0 for `validation`: as `robustft.data.sources.reading_workers` says.
        process_timeout: seconds after which a process of several that does not answer ends the others.
        log_every: steps between records.
        on_record: called with each record. That of a step also has samples_per_second, and peak_memory and
            peak_cuda_memory in bytes; metrics.jsonl has not, because they differ from run to run. If it has a `close`,
            that is called in the end, also after an error. `robustft.training.reporter` makes some.
        progress: a bar on a terminal, else a line every few seconds to `log` (standard error by default).

    Raises:
        NonFiniteError: before the update that would spoil the weights. The last checkpoint stays. A GPU does not wait
            for its numbers: there that update leaves the weights as they are and the error comes with the next step,
            when what follows the weights, as a teacher, has counted it.
        KeyboardInterrupt: on Ctrl-C, after the current step and its checkpoint. A second Ctrl-C does not
            wait.
        ValueError, TypeError: bad arguments or data, a configuration other than the checkpoint's, or trained weights
            in half precision, in which most updates are lost.
        RuntimeError: another process of several has ended or hangs; the last checkpoint stays. Or `compile` lacks a
            compiler, which is said before anything is written, or torch.compile has failed.
        FileExistsError, FileNotFoundError, BlockingIOError, OSError: `output` holds a run, has none to
            resume, is in use by another process, or cannot be written.
    """
    arguments, started = dict(locals()), time.monotonic()
    with ExitStack() as held:
        held.enter_context(closed(on_record))
        processes = held.enter_context(joined(process_timeout))
        settings = Settings(**{field.name: arguments[field.name] for field in fields(Settings)})
        check_arguments(log_every=log_every, validate_every=validate_every, accumulate=accumulate)
        if accumulate > batch_size:
            raise ValueError(f"accumulate must be at most batch_size, {batch_size}, got {accumulate}")
        check_workers(workers)
        if resume and output is None:
            raise ValueError("resume=True needs output, the folder of the run to continue")
        source, described = _prepared(method, data, device)
        if dry_run:
            settings = replace(settings, epochs=1, limit_batches=1)
            held.enter_context(restored(method))
        if grad_checkpointing:
            held.enter_context(recomputing(method))
        towers = CompiledTowers(method, "default" if compile is True else compile) if compile else nullcontext()
        planned = Schedule(settings, len(source))
        measured = _validation(
            method,
            validation,
            patience,
            metric=metric,
            higher_is_better=higher_is_better,
            every=max(1, round(validate_every * planned.per_epoch)),
            seed=seed,
            workers=workers or None,
            brief=dry_run,
        )
        _begin(method, planned.total, dry_run)
        held.enter_context(tables_as_before(method))
        optimization = Optimization(method, settings, Spread(accumulate, processes.group))
        config = {"method": method.config, "data": described}
        _check_processes(processes, planned, {**config, "settings": asdict(settings), "output": output is not None})
        run = None
        if output is not None:
            folder = Path(output)
            processes.of_main(lambda: held.enter_context(opened(folder, resume)))
            if not dry_run:
                run = Run(folder, method, optimization, planned, measured, config, processes)
        if run is None:
            processes.share(method.state_dict().values())
        step, records = (0, []) if run is None else run.resume() if resume else run.start()
        shows = progress and processes.main
        training = Training(
            method=method,
            source=source,
            schedule=planned,
            optimization=optimization,
            towers=towers,
            validation=measured,
            run=run,
            processes=processes,
            shown=held.enter_context(Progress(type(method).__name__, planned.total, step, shows, log)),
            on_record=on_record if processes.main and not dry_run else None,
            log_every=log_every,
            step=step,
            records=records,
        )
        training.steps(workers)
        if restore_best and not dry_run:
            training.restore_best()
        training.source.skipped |= {one.row: one for one in processes.merged(training.source.skipped.values())}
    return _history(training, time.monotonic() - started)


def _check_processes(processes: Processes, planned: Schedule, config: Mapping[str, Any]) -> None:
    """ValueError, on every process, where one of them would train on something else, or on nothing."""
    rows = min(planned.settings.batch_size, planned.samples)
    if rows < processes.count:
        raise ValueError(
            f"batch_size must be at least the number of processes, {processes.count}, got batches of {rows}"
        )
    told = processes.all(json.dumps(config, default=str, sort_keys=True))
    if other := next((number for number, one in enumerate(told) if one != told[0]), None):
        differing = "; ".join(differences(json.loads(told[0]), json.loads(told[other])))
        raise ValueError(f"the processes do not train the same: from process 0 to process {other}, {differing}")


def _prepared(method: Method, data: Any, device: torch.device | str | None) -> tuple[Source, Any]:
    """The method on its device, and what it trains on, with what a checkpoint says of that."""
    check_trainable_precision(method)
    if device is not None:
        move(method, device)
    source = Source(data, method.model, name="data", classes=method.classes, of=f"the {type(method).__name__}")
    return source, source.check_training(len(method.class_names), method.takes_features)


def _history(training: Training, seconds: float) -> History:
    """What was done, and how it ended."""
    measured, skipped = training.validation, tuple(training.source.skipped.values())
    stopped = measured is not None and measured.exhausted and training.step < training.schedule.total
    best = None if measured is None else measured.best
    return History(training.records, training.step, seconds, best=best, stopped_early=stopped, skipped=skipped)


def _begin(method: Method, total: int, dry_run: bool) -> None:
    """Tells the method how long the run is."""
    if method.total_steps not in (None, total) and not dry_run:
        warnings.warn(
            f"{type(method).__name__} was made for total_steps={method.total_steps}, this run has {total}: "
            "what it schedules over the run will end at another point",
            stacklevel=4,
        )
    method.begin_run(total)


def _validation(method: Method, data: Any, patience: int | None, **options: Any) -> Validation | None:
    if data is not None:
        return Validation(method, data, patience=patience, **options)
    if patience is not None:
        raise ValueError(f"patience={patience} needs validation, the set on which to see whether to stop")
    return None
