"""The folder of a run: whose it is, what it holds, and how a later process goes on with it.

    <output>/metrics.jsonl     a record a line
             checkpoints/      `robustft.training.checkpoint`, and below it best/, the best weights on a validation set
             run.lock          only while a process works there

A folder that belongs to more than one training, as a quickstart's, holds its configuration in config.yaml instead.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robustft.files import append_line, clear_unfinished, is_unfinished, locked, write_text
from robustft.methods.base import Method
from robustft.ops.processes import ALONE, Processes
from robustft.training.checkpoint import (
    Checkpoint,
    best_checkpoint,
    discard_unfinished,
    latest_checkpoint,
    save_best,
    save_checkpoint,
)
from robustft.training.optimization import Optimization
from robustft.training.reporting import Record
from robustft.training.schedule import Schedule
from robustft.training.validation import Validation

LENGTH = ("epochs", "warmup")  # of a configuration: what another run may have, of which this is a part
CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"


def holds_run(folder: Path) -> bool:
    """Whether there is something of a run in `folder`: not what a kill during its very first save leaves."""
    return (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("step_*"))


@contextmanager
def opened(folder: Path, resume: bool) -> Iterator[None]:
    """Holds a folder that can be written, and that holds no run unless that is to be resumed.

    OSError, FileExistsError; BlockingIOError while another process works there.
    """
    make_folder(folder)
    with in_use(folder):
        if holds_run(folder) and not resume:
            raise FileExistsError(
                f"output folder {folder} already holds a run: pass resume=True to continue it, or choose another folder"
            )
        yield


def make_folder(folder: Path) -> None:
    """Makes a folder; OSError, naming it, where none can be made or written."""
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"output folder {folder} cannot be written: {error.strerror}") from error


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Holds a run's folder against other processes and threads; BlockingIOError where one of them holds it."""
    with locked(folder / LOCK_FILE):
        yield


@contextmanager
def configured(folder: Path, config: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Holds a folder for a run of `config`: it is new, or, with `resume`, holds just that run.

    ValueError for a run of another configuration, FileExistsError for a folder with other files, OSError for one that
    cannot be written, BlockingIOError while another process works there.
    """
    import yaml

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; choose another name")
    make_folder(folder)
    with in_use(folder):
        path = folder / CONFIG_FILE
        config = json.loads(json.dumps(config))
        if path.exists() and resume:
            try:
                before = yaml.safe_load(path.read_bytes())
            except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
                raise ValueError(f"{path} cannot be read: {error}; choose another output folder") from error
            if before != config:
                raise ValueError(
                    f"{folder} holds a run of another configuration ({path}); choose another output folder"
                )
            clear_unfinished(folder)
        else:
            _check_empty(folder, resume)
            with _naming(folder):
                write_text(path, yaml.safe_dump(config, sort_keys=False))
        yield


def _check_empty(folder: Path, resume: bool) -> None:
    # A kill during the first write leaves that under its temporary name, and the lock.
    if all(entry.name == LOCK_FILE or is_unfinished(entry) for entry in folder.iterdir()):
        return
    if resume:
        raise FileExistsError(f"output folder {folder} holds files but no run to resume (there is no {CONFIG_FILE})")
    raise FileExistsError(
        f"output folder {folder} already holds a run or other files: --resume continues it, --output names another"
    )


class Run:
    """The files of one run: metrics.jsonl, and checkpoints/ of everything that changes.

    Of several processes the main one alone reads and writes them, and the others are given what it has.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        optimization: Optimization,
        schedule: Schedule,
        validation: Validation | None,
        config: Mapping[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.checkpoint: Path | None = None
        self.method, self.optimization, self.schedule, self.validation = method, optimization, schedule, validation
        self.processes = processes
        about = None if validation is None else validation.config
        config = {**config, "validation": about, **asdict(schedule.settings)}
        self.config = json.loads(json.dumps(config))  # as a checkpoint will give it back: tuples are lists

    def start(self) -> tuple[int, list[Record]]:
        """A checkpoint at step 0, so that a kill before the first epoch's end can be resumed too."""
        self.processes.of_main(lambda: discard_unfinished(self.checkpoints))
        self.processes.share(self.method.state_dict().values())
        self.save(0)
        self.processes.of_main(self.metrics.touch)
        return 0, []

    def resume(self) -> tuple[int, list[Record]]:
        """Puts everything back as at the latest checkpoint; its step and the records until then.

        ValueError under another configuration, unless that only makes the run longer, or shorter, and the steps that
        are done would have been the same; OSError where the best weights are not whole.
        """
        step, records, self.checkpoint, self.method.scheduled, validation, specs, scaler = self.processes.of_main(
            self._resumed
        )
        self.processes.share(self.method.state_dict().values())
        if self.processes.count > 1:
            moments = self.optimization.state()[0] if self.processes.main else _empty(specs, self.optimization.device)
            self.processes.share(moments[name] for name in specs)
            if not self.processes.main:
                self.optimization.restore(moments, scaler)
                if self.validation is not None:
                    self.validation.restore(validation)
        return step, records

    def _resumed(self) -> tuple[Any, ...]:
        """`resume` of the process that reads, and what the others need to follow it."""
        found = latest_checkpoint(self.checkpoints)
        self._check(found)
        self._restore(found)
        if int(self.method.run_steps) != self.schedule.total:
            self.method.begin_run(self.schedule.total)
        discard_unfinished(self.checkpoints, found.step)
        moments, scaler = self.optimization.state()
        specs = {name: (value.shape, value.dtype, value.device.type) for name, value in moments.items()}
        validation = None if self.validation is None else self.validation.state()
        records = self._truncate_metrics(found.step)
        return found.step, records, found.path, self.method.scheduled, validation, specs, scaler

    def _check(self, found: Checkpoint) -> None:
        before, total = found.meta.get("config"), self.schedule.total
        if differing := differences(before, self.config):
            error = f"cannot resume {found.path} under another configuration: {'; '.join(differing)}"
            if not isinstance(before, dict) or not self._only_longer(before):
                raise ValueError(error)
            if reason := self._why_not_after(before, found.meta):
                raise ValueError(f"{error}. {reason}")
        if not 0 <= found.step <= total:
            raise ValueError(f"cannot resume {found.path}: its step is {found.step}, this run has {total}")

    def _only_longer(self, before: dict[str, Any]) -> bool:
        """Whether this run has another length than the one before, and is the same otherwise."""
        length = {name: self.config[name] for name in LENGTH}
        return before.get("epochs") != self.config["epochs"] and not differences(before | length, self.config)

    def _why_not_after(self, before: Mapping[str, Any], meta: Mapping[str, Any]) -> str | None:
        if meta["scheduled"] and self.method.total_steps is None:
            return (
                f"{type(self.method).__name__} has a schedule over the whole run, which would have been another: give "
                "it total_steps, the length that the run is to have in the end, from the start"
            )
        return self.schedule.why_not_after(before)

    def _restore(self, found: Checkpoint) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"method": {}, "optimizer": {}}
        try:
            for name, value in found.tensors.items():
                part, _, key = name.partition(".")
                parts[part][key] = value
            self.method.load_state_dict(parts["method"])
            self.method.scheduled |= found.meta["scheduled"]
            self.optimization.restore(parts["optimizer"], found.meta["scaler"])
            if self.validation is not None:
                self.validation.restore(found.meta["validation"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            name = type(self.method).__name__
            raise ValueError(f"cannot resume {found.path}: it holds no state of this {name}: {error}") from error
        if self.validation is not None and self.validation.best is not None:
            best_checkpoint(self.checkpoints, self.validation.best.step)  # an error now rather than at the end

    def save(self, step: int) -> None:
        self.checkpoint = self.processes.of_main(lambda: self._saved(step))

    def _saved(self, step: int) -> Path:
        moments, scaler = self.optimization.state()
        tensors = self._weights() | {f"optimizer.{name}": value for name, value in moments.items()}
        validation = None if self.validation is None else self.validation.state()
        state = {"scaler": scaler, "scheduled": self.method.scheduled, "validation": validation}
        return save_checkpoint(self.checkpoints, step, tensors, self._about() | state)

    def save_best(self, step: int, measures: Mapping[str, float]) -> None:
        about = self._about() | {"measures": dict(measures)}
        self.processes.of_main(lambda: save_best(self.checkpoints, step, self._weights(), about))

    def load_best(self, step: int) -> None:
        """Gives the method the best weights, those of `step`."""

        def load() -> None:
            tensors = best_checkpoint(self.checkpoints, step).tensors
            self.method.load_state_dict({name.removeprefix("method."): value for name, value in tensors.items()})

        self.processes.of_main(load)
        self.processes.share(self.method.state_dict().values())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {f"method.{name}": value for name, value in self.method.state_dict().items()}

    def _about(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        }

    def append(self, record: Record) -> None:
        if self.processes.main:
            append_line(self.metrics, json.dumps(record))

    def _truncate_metrics(self, step: int) -> list[Record]:
        # What was logged after the checkpoint will be logged again; a kill may have cut the last line short.
        records: list[Record] = []
        for line in self.metrics.read_bytes().splitlines() if self.metrics.exists() else []:
            try:
                record = json.loads(line)
                if record["step"] > step:
                    break
            except (KeyError, TypeError, ValueError):
                break
            records.append(record)
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))
        return records


def _empty(specs: Mapping[str, tuple[torch.Size, torch.dtype, str]], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors to be filled: on the device, or on the CPU where the main process has them there."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device if kind == device.type else kind)
        for name, (shape, dtype, kind) in specs.items()
    }


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two configurations, field by field."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = before.keys() | now.keys()
        parts = (differences(before.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in sorted(names))
        return [line for part in parts for line in part]
    return [] if before == now else [f"{name} was {before!r:.100} and is {now!r:.100} now"]
