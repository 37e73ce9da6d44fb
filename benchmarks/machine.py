"""What a number was measured on, and where results are written."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import robustft

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """The machine and the software, without anything that names a person or a place."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    info = robustft.build_info()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": info.get("active_isa"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "robustft": robustft.__version__,
    }


def write(name: str, command: str, results: Any) -> Path:
    """Writes results/<name>.json with its command and machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"command": command, "machine": describe(), "results": results}, indent=1) + "\n")
    os.replace(temporary, path)
    return path
