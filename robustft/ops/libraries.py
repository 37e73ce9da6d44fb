"""The compiled operators: loaded when imported, so that nothing is left to do, or for torch.compile to trace, later."""

from __future__ import annotations

import os

import torch

from robustft import machine

ISA_NAMES = ("portable", "avx2", "avx512", "amx")


def _load() -> dict[str, str]:
    wanted = os.environ.get("ROBUSTFT_CPU_ISA")
    if wanted is not None and wanted not in ISA_NAMES:
        raise ValueError(f"ROBUSTFT_CPU_ISA is {wanted!r}; expected one of {', '.join(ISA_NAMES)}")
    status: dict[str, str] = {}
    for device in ("cpu", "cuda"):
        path = machine.compiled_folder() / f"_ops_{device}.so"
        if not path.exists():
            status[device] = "not built"
        elif device == "cuda" and torch.version.cuda is None:
            status[device] = "not loaded: this torch has no CUDA"
        elif device == "cuda" and status["cpu"] != "loaded":
            status[device] = "not loaded: the CPU library, which holds the schemas, is missing"
        else:
            try:
                torch.ops.load_library(str(path))
                status[device] = "loaded"
            except OSError as error:
                status[device] = f"failed to load: {error}"
    return status


LIBRARIES = _load()
"""For "cpu" and "cuda": "loaded", or why not."""
