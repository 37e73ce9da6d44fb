"""The optional loop: AdamW, warm-up and cosine, clipping, mixed precision, checkpoints, exact resume.

    lr(t) = lr (t + 1) / w                              for t < w = round(warmup T)
    lr(t) = lr (1 + cos(pi (t - w) / (T - w))) / 2      after it; T steps in all

Whatever is random, the order of the samples, their augmentation, captions and dropout, is a function of
(seed, t), never of a generator's history. So weights, moments, loss scale and t are the whole state of a run,
and one that is killed at any step and resumed ends bit for bit like one that never was (CPU, fp32, same
number of threads).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robustft.clip.features import image_statistics
from robustft.data.batch import check_labels, column, unpack
from robustft.methods.base import Method, Step, stateless_generator, stateless_seed
from robustft.training.checkpoint import latest_checkpoint, save_checkpoint

Record = dict[str, float | None]
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS_BETWEEN_LINES = 5.0
SKIPS_BEFORE_ERROR = 20  # fp16 halves its loss scale at each: 65536 has come down to 1/16 by then


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


def steps_per_epoch(samples: int, batch_size: int, limit_batches: int | None = None) -> int:
    """Batches in an epoch: the whole ones, or a short one where there are too few samples for any."""
    steps = max(1, samples // batch_size)
    return steps if limit_batches is None else min(steps, limit_batches)


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
        data: (images (n, C, H, W), labels (n,)), a dictionary {"image": ..., "label": ...} of these and of
            further tensors of n rows that the method takes ("group", "core"), an object whose
            .tensors(mean, std) gives either, or a dataset of (image, label), (image, text) or {"image",
            "label" / "text", ...}. Objects' `groups`, if they have any, go along as "group". A dataset's
            augmentation may use torch's, numpy's or Python's global generators: each is seeded by
            (seed, epoch, index).
        epochs, batch_size, lr, weight_decay: as usual.
        warmup: fraction of all steps over which the rate rises.
        clip: largest norm of the whole gradient, after the fp16 loss scale is taken out; None for no limit.
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
        ValueError, TypeError: bad arguments or data, or a configuration other than the checkpoint's.
        FileExistsError, FileNotFoundError, OSError: `output` holds a run, has none to resume, or cannot be
            written.
    """
    started = time.monotonic()
    check_arguments(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        precision=precision,
        limit_batches=limit_batches,
        log_every=log_every,
    )
    if resume and output is None:
        raise ValueError("resume=True needs output, the folder of the run to continue")
    if device is not None:
        method.to(device)
    where = method.steps.device
    if callable(getattr(data, "tensors", None)):
        groups = getattr(data, "groups", None)
        data = data.tensors(*image_statistics(method.model))
        if groups is not None and _is_tensors(data):
            data = {"image": data[0], "label": data[1], "group": groups}
    samples, described = _describe(data, method)
    if dry_run:
        epochs, limit_batches = 1, 1
    per_epoch = steps_per_epoch(samples, batch_size, limit_batches)
    total = epochs * per_epoch
    if method.total_steps not in (None, total) and not dry_run:
        warnings.warn(
            f"{type(method).__name__} was made for total_steps={method.total_steps}, this run has {total}: "
            "what it schedules over the run will end at another point",
            stacklevel=2,
        )
    config = {
        "method": method.config,
        "data": described,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip": clip,
        "precision": precision,
        "seed": seed,
        "limit_batches": limit_batches,
    }
    parameters = [p for p in method.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(method).__name__} has no parameter that requires a gradient")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        fused=where.type in ("cpu", "cuda"),
    )
    scaler = torch.amp.GradScaler(where.type, enabled=precision == "fp16")
    run, step, records = None, 0, []
    if output is not None:
        _open_output(Path(output), resume)
        if not dry_run:
            run = _Run(Path(output), method, optimizer, scaler, config)
    if run is not None and resume:
        step, records = run.resume()
    elif run is not None:
        run.start()

    report = _Progress(type(method).__name__, total, step, progress, log)
    skipped = 0
    method.train()
    unchanged = _restored(method) if dry_run else nullcontext()
    with unchanged, _own_generators(where), _deferred_interrupt() as interrupted, report:
        for epoch in range(step // per_epoch, epochs):
            order = torch.randperm(samples, generator=stateless_generator(seed, "order", epoch))
            chunks = order[: per_epoch * batch_size].split(batch_size)[step % per_epoch :]
            for batch in _batches(data, chunks, seed, epoch, workers):
                rate = learning_rate(step, total, lr, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                torch.manual_seed(stateless_seed(seed, "step", step))
                with torch.autocast(where.type, DTYPES[precision], enabled=precision != "fp32"):
                    out = method.step(_to(batch, where))
                optimizer.zero_grad()
                scaler.scale(out.loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                loss, size = out.loss.item(), norm.item()
                # An infinite gradient is how fp16 learns that its loss scale is too high: no update.
                skipped = skipped + 1 if scaler.is_enabled() and not math.isfinite(size) else 0
                if not math.isfinite(loss) or not (math.isfinite(size) or 0 < skipped < SKIPS_BEFORE_ERROR):
                    raise _non_finite(method, out, step, epoch, None if run is None else run.checkpoint)
                if clip is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
                scaler.step(optimizer)
                scaler.update()
                method.after_step()
                step += 1
                report.update(step, f"epoch {epoch + 1}/{epochs}", f"loss {loss:.4f}")
                if step % log_every == 0 or step in (1, total):
                    terms = {name: value.item() for name, value in out.terms.items()}
                    record = {"step": step, "epoch": epoch + 1, "lr": rate, "loss": loss, **terms}
                    # None where fp16 skipped the update: JSON has no word for infinity.
                    records.append(record | {"gradient_norm": None if skipped else size})
                    if run is not None:
                        run.append(records[-1])
                if interrupted:
                    break
            if run is not None:
                run.save(step)
            if interrupted:
                saved = "nothing was saved: no output" if run is None else f"resume from {run.checkpoint}"
                raise KeyboardInterrupt(f"stopped after step {step} of {total}; {saved}")
    return History(records, step, time.monotonic() - started)


def holds_run(folder: Path) -> bool:
    """Whether there is something of a run in `folder`: not what a kill during its very first save leaves."""
    return (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("step_*"))


def learning_rate(step: int, total: int, lr: float, warmup: float) -> float:
    """The rate of a step in [0, total): up over round(warmup * total) steps, then a cosine down to 0."""
    rising = round(warmup * total)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2


class _Run:
    """The files of one run: metrics.jsonl and checkpoints/ of everything that changes."""

    def __init__(
        self,
        folder: Path,
        method: Method,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: dict[str, Any],
    ) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.checkpoint: Path | None = None
        self.method, self.optimizer, self.scaler = method, optimizer, scaler
        self.config = json.loads(json.dumps(config))  # as a checkpoint will give it back: tuples are lists

    def start(self) -> None:
        """A checkpoint at step 0, so that a kill before the first epoch's end can be resumed too."""
        self.save(0)
        self.metrics.touch()

    def resume(self) -> tuple[int, list[Record]]:
        """Put everything back as at the latest checkpoint; returns its step and the records until then."""
        path, step, tensors, meta = latest_checkpoint(self.checkpoints)
        differing = _differences(meta.get("config"), self.config)
        if differing:
            raise ValueError(f"cannot resume {path} under another configuration: {'; '.join(differing)}")
        self.method.load_state_dict(_with_prefix(tensors, "method."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _with_prefix(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(meta["scaler"])
        self.checkpoint = path
        return step, self._truncate_metrics(step)

    def save(self, step: int) -> None:
        tensors = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        meta = {"config": self.config, "scaler": self.scaler.state_dict(), "versions": versions}
        self.checkpoint = save_checkpoint(self.checkpoints, step, tensors, meta)

    def append(self, record: Record) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _truncate_metrics(self, step: int) -> list[Record]:
        # What was logged after the checkpoint will be logged again; a kill may have cut the last line short.
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] > step:
                break
            records.append(record)
        temporary = self.metrics.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(temporary, self.metrics)
        return records


class _Progress:
    """A bar where there is a terminal, elsewhere a line every few seconds: bars fill log files."""

    def __init__(self, name: str, total: int, done: int, shown: bool, log: Callable[[str], None] | None) -> None:
        self.name, self.total, self.done = name, total, done
        self.lines = shown and (log is not None or not sys.stderr.isatty())
        self.log = log or _to_stderr
        self.bar = None
        if shown and not self.lines:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True)
        self.started = self.told = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, step: int, epoch: str, loss: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{epoch}, {loss}", refresh=False)
            self.bar.update()
        now = time.monotonic()
        if self.lines and (step == self.total or now - self.told >= SECONDS_BETWEEN_LINES):
            self.told = now
            rate = (step - self.done) / (now - self.started)
            self.log(f"{self.name}: {epoch}, step {step}/{self.total}, {loss}, {rate:.1f} steps/s")


class _Seeded(torch.utils.data.Dataset):
    """A dataset whose augmentation is a function of (seed, epoch, index), in whichever process it runs."""

    def __init__(self, data: Any, seed: int, epoch: int) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        number = stateless_seed(self.seed, "sample", self.epoch, index)
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        return self.data[index]


def _batches(data: Any, chunks: Sequence[Tensor], seed: int, epoch: int, workers: int) -> Iterator[Any]:
    if isinstance(data, Mapping):
        return ({key: part[chunk.to(part.device)] for key, part in data.items()} for chunk in chunks)
    if _is_tensors(data):
        return (tuple(part[chunk.to(part.device)] for part in data) for chunk in chunks)
    return iter(
        torch.utils.data.DataLoader(
            _Seeded(data, seed, epoch),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=workers,
            worker_init_fn=_ignore_interrupt,
        )
    )


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the loop still wants the batch in flight.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_tensors(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor)


def _to(batch: Any, device: torch.device) -> Any:
    match batch:
        case Tensor():
            return batch.to(device, non_blocking=True)
        case tuple() | list() if batch and not isinstance(batch[0], str):
            return tuple(_to(part, device) for part in batch)
        case dict():
            return {key: _to(part, device) for key, part in batch.items()}
    return batch


def _describe(data: Any, method: Method) -> tuple[int, dict[str, Any]]:
    """How many samples, and what a resumed run must find the same."""
    if not (_is_tensors(data) or isinstance(data, Mapping)):
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise TypeError(f"data must be (images, labels) or a dataset with a length, got {type(data).__name__}")
        if len(data) == 0:
            raise ValueError("data is empty")
        return len(data), {"samples": len(data)}
    images, labels, _ = unpack(data, method.takes_features)
    if labels is None:
        raise ValueError("data of tensors must hold images and labels: labels (n,) of class indices")
    columns = {key: part for key, part in data.items() if key != "image"} if isinstance(data, Mapping) else {}
    for key in columns:
        column(data, key, images)
    check_labels(labels, len(method.class_names))
    finite = images.flatten(1).isfinite().all(1)
    if not finite.all():
        raise ValueError(f"images must be finite: image {int(finite.logical_not().nonzero()[0])} is not")
    digest = hashlib.sha256(labels.cpu().long().contiguous().numpy().tobytes()).hexdigest()[:16]
    described = {"samples": len(images), "image_shape": list(images.shape[1:]), "labels": digest}
    further = {key: _digest(part) for key, part in columns.items() if key != "label"}
    return len(images), described | ({"columns": further} if further else {})


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()[:16]


def check_arguments(**arguments: Any) -> None:
    """ValueError if one of `fit`'s arguments, of those that are given, is out of range."""
    for name in ("epochs", "batch_size", "log_every", "limit_batches"):
        value = arguments.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("lr", "clip"):
        value = arguments.get(name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not (weight_decay := arguments.get("weight_decay", 0.0)) >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if not 0 <= (warmup := arguments.get("warmup", 0.0)) < 1:
        raise ValueError(f"warmup is a fraction of all steps and must lie in [0, 1), got {warmup}")
    if (precision := arguments.get("precision", "fp32")) not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")


def _open_output(folder: Path, resume: bool) -> None:
    """Make sure that `folder` can be written, and that it holds no run unless that is to be resumed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"output folder {folder} cannot be written: {error.strerror}") from error
    if holds_run(folder) and not resume:
        raise FileExistsError(
            f"output folder {folder} already holds a run: pass resume=True to continue it, or choose another folder"
        )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two configurations, field by field."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = before.keys() | now.keys()
        parts = (_differences(before.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in sorted(names))
        return [line for part in parts for line in part]
    return [] if before == now else [f"{name} was {before!r:.100} and is {now!r:.100} now"]


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


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


@contextmanager
def _deferred_interrupt() -> Iterator[list[bool]]:
    """Ctrl-C fills the list, for the loop to see after its step; a second Ctrl-C interrupts at once."""
    seen: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield seen  # only the main thread may set handlers; an ignored Ctrl-C stays ignored
        return

    def handler(number: int, frame: object) -> None:
        seen.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _restored(method: Method) -> Iterator[None]:
    """Whatever happens inside, the method leaves with the state it came with, and without gradients."""
    before = copy.deepcopy(method.state_dict())
    try:
        yield
    finally:
        method.load_state_dict(before)
        method.zero_grad()


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """Seed at will inside; the caller's global generators go on afterwards as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
