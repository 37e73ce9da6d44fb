"""The results file: a record a row and thread count, written when the row is done, so that a killed run goes on.

Rows are kept for as long as the machine, torch and robustft's code are the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import robustft
from robustft.files import write_json

from . import machine


def settings() -> dict[str, Any]:
    """What has to be the same for two rows to stand in one file."""
    where = machine.describe()
    del where["threads"]  # of each record
    return where | {"amx": machine.has_amx(), "code": _code()}


def _code() -> str:
    """A digest of what computes robustft's functions on a CPU: the libraries, functional and ops but Triton's."""
    package = Path(robustft.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    operators = [path for path in (package / "ops").rglob("*.py") if path.parent.name != "triton"]
    for path in sorted([*package.glob("*.so"), package / "functional.py", *operators]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


COMMAND = 'python -m benchmarks --threads THREADS --only "NAME", with both as in the record'


class Store:
    """The file at `path`.

    Attributes:
        machine: the settings of all its records.
        records: in the order of their measurement.
        dropped: how many the file held that were measured under other settings.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.machine = settings()
        self.records: list[dict[str, Any]] = []
        self.dropped = 0
        if path.exists() and not fresh:
            held = read(path)
            if held["machine"] == self.machine:
                self.records = held["records"]
            else:
                self.dropped = len(held["records"])

    def has(self, name: str, threads: int) -> bool:
        """Whether the row is measured; one that robustft could not run, or not then, is to be tried again."""
        own = (r for r in self.records if r["name"] == name and r["threads"] == threads)
        return any("seconds" in r["candidates"]["robustft"] for r in own)

    def add(self, record: dict[str, Any]) -> None:
        key = record["name"], record["threads"]
        self.records = [r for r in self.records if (r["name"], r["threads"]) != key] + [record]
        self.write()

    def write(self) -> None:
        write_json(self.path, {"command": COMMAND, "machine": self.machine, "records": self.records})


def read(path: Path) -> dict[str, Any]:
    """{"machine": ..., "records": [...]}; ValueError for anything else."""
    try:
        held = json.loads(path.read_text())
        return {"machine": dict(held["machine"]), "records": list(held["records"])}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no benchmark results ({error!r}); --fresh starts over") from error
