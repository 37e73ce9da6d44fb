"""Records of a run on their way to whoever looks: a function, a file, TensorBoard, Weights & Biases, MLflow, trackio.

    fit(method, data, on_record=print, ...)
    fit(method, data, on_record=reporter("tensorboard", "runs/photos", config), ...)

A record is what `robustft.training.fit` says. What has a `close` is closed when `fit` ends, however that is.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from robustft.files import append_line

Record = dict[str, float | None]
OnRecord = Callable[[Record], object]
RECORDS_FILE = "records.jsonl"
MLFLOW_FILE = "mlflow.db"
PROJECT = "robustft"
PARAMETER_LENGTH = 500  # of MLflow's parameters, in every version of it


class Reporter(Protocol):
    """Takes records, in the order of their steps, until it is closed."""

    def __call__(self, record: Record) -> None: ...

    def close(self) -> None: ...


def reporter(kind: str, folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Reporter:
    """A reporter for `on_record`.

    Args:
        kind: "tensorboard", events in `folder`; "wandb", a run of Weights & Biases with its files in `folder`;
            "mlflow", a run at the address that MLFLOW_TRACKING_URI names, else in `folder`/mlflow.db; "trackio", a run
            in trackio's own place; "jsonl", the lines of `folder`/records.jsonl. A project is called "robustft", a run
            as the folder; wandb's and mlflow's own environment variables name others.
        folder: made if it is missing.
        config: told beside the records, as the hyper-parameters of the run.

    Raises: ValueError for another kind, ImportError naming the extra where its library is missing.
    """
    if kind not in REPORTERS:
        raise ValueError(f"a reporter must be one of {', '.join(map(repr, REPORTERS))}, got {kind!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return REPORTERS[kind](folder, json.loads(json.dumps(dict(config or {}), default=str)))


class TensorBoard:
    """Scalars by step, the configuration as a text."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        _library("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))
        if config:
            self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def __call__(self, record: Record) -> None:
        step, values = _split(record)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        name = os.environ.get("WANDB_NAME", folder.name)
        self.run = _library("wandb", "wandb").init(project=project, name=name, dir=str(folder), config=dict(config))

    def __call__(self, record: Record) -> None:
        step, values = _split(record)
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, whatever run the caller has open himself."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        mlflow = _library("mlflow", "mlflow")
        address = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = mlflow.MlflowClient(tracking_uri=address or f"sqlite:///{folder.absolute() / MLFLOW_FILE}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:  # whose files a server keeps where it wants to
            place = None if address else (folder / "artifacts").absolute().as_uri()
            number = self.client.create_experiment(name, artifact_location=place)
        else:
            number = experiment.experiment_id
        self.id = self.client.create_run(number, run_name=folder.name).info.run_id
        for key, value in _flat(config):
            self.client.log_param(self.id, key, value)

    def __call__(self, record: Record) -> None:
        step, values = _split(record)
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    """A run of trackio, the one that is open while this one is."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.library = _library("trackio", "trackio")
        self.library.init(project=PROJECT, name=folder.name, config=dict(config))

    def __call__(self, record: Record) -> None:
        step, values = _split(record)
        self.library.log(values, step=step)

    def close(self) -> None:
        self.library.finish()


class JSONLines:
    """A record a line, with what metrics.jsonl leaves out because it differs from run to run."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.path = folder / RECORDS_FILE
        if config:
            append_line(self.path, json.dumps({"config": config}))

    def __call__(self, record: Record) -> None:
        append_line(self.path, json.dumps(record))

    def close(self) -> None:
        """There is nothing to close: every line is written."""


REPORTERS: dict[str, Callable[[Path, Mapping[str, Any]], Reporter]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
    "jsonl": JSONLines,
}


@contextmanager
def closed(on_record: OnRecord | None) -> Iterator[None]:
    """Closes what takes the records, if it can be closed, whatever happens inside."""
    with ExitStack() as held:
        if callable(close := getattr(on_record, "close", None)):
            held.callback(close)
        yield


def peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes: the most that this process has had so far, and on a GPU the most that its tensors had there."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_memory": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if device.type == "cuda":
        found["peak_cuda_memory"] = float(torch.cuda.max_memory_allocated(device))
    return found


def _split(record: Record) -> tuple[int, dict[str, float]]:
    """The step, and what else the record holds and is known."""
    step = record["step"]
    assert step is not None  # every record has one
    return int(step), {name: value for name, value in record.items() if name != "step" and value is not None}


def _flat(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _flat(value, f"{name}.{key}".lstrip("."))
    else:
        yield name, str(config)[:PARAMETER_LENGTH]


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed, which this reporter needs: pip install 'robustft[{extra}]'"
        ) from error
