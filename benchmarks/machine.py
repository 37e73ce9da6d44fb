"""What a number was measured on, and where results are written."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import robustft
from robustft.files import write_json
from robustft.machine import processor

RESULTS = Path(__file__).parent / "results"
"""Of the source tree. An installed robustft must not write there; see `output_folder`."""


def describe() -> dict[str, Any]:
    """The machine and the software, without anything that names a person or a place."""
    info = robustft.build_info()
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "isa": info.get("active_isa"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "robustft": robustft.__version__,
    }


def output_folder() -> Path:
    """Where a run writes by default: the source tree's results, else a folder in the current one."""
    return RESULTS if (RESULTS.parent.parent / "pyproject.toml").exists() else Path("robustft-benchmarks")


def slug() -> str:
    """The machine as a file name: processor, instruction set, cores."""
    where = describe()
    words = f"{where['cpu']} {'amx' if has_amx() else where['isa'] or 'eager'} {where['cores']} cores"
    return re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 tiles."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " amx_bf16" in cpuinfo.read_text()


def line(where: dict[str, Any]) -> str:
    """A machine, as `describe` has it, under a table."""
    threads = f"{where['threads']} thread" + ("s" if where["threads"] > 1 else "")
    return f"{where['cpu']} ({where['isa']}), {threads}, torch {where['torch']}."


def write(name: str, command: str, results: Any) -> Path:
    """Writes results/<name>.json with its command and machine."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"command": command, "machine": describe(), "results": results})
    return path
