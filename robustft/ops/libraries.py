"""The compiled operators: loaded when imported, so that nothing is left to do, or for torch.compile to trace, later."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from robustft import machine

ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def _of_another_cuda(compiler: str, wanted: str) -> str | None:
    """Why a library that holds the CUDA runtime of that compiler ("nvcc 13.0.88") does not suit a torch for `wanted`.

    Libraries of CUDA serve drivers and each other within a major version. Beyond it the library would load all the
    same, and its first launch would fail, where the driver is as old as the torch.
    """
    built = re.search(r"(\d+)\.\d+", compiler)
    if built is None or built[1] == wanted.split(".")[0]:
        return None
    major = wanted.split(".")[0]
    return (
        f"not loaded: it was built by {compiler}, and this torch is for CUDA {wanted}; build it again with an nvcc "
        f"{major}, or install a torch for CUDA {built[1]}"
    )


def _load() -> dict[str, str]:
    wanted = os.environ.get("ROBUSTFT_CPU_ISA")
    if wanted is not None and wanted not in ISA_NAMES:
        raise ValueError(f"ROBUSTFT_CPU_ISA is {wanted!r}; expected one of {', '.join(ISA_NAMES)}")
    status: dict[str, str] = {}
    of_torch = torch.version.cuda
    for device in ("cpu", "cuda"):
        path = machine.compiled_folder() / f"_ops_{device}.so"
        if not path.exists():
            status[device] = "not built"
        elif device == "cuda" and of_torch is None:
            status[device] = "not loaded: this torch has no CUDA"
        elif device == "cuda" and of_torch and (why := _of_another_cuda(_cuda_compiler(path.parent), of_torch)):
            status[device] = why
        elif device == "cuda" and status["cpu"] != "loaded":
            status[device] = "not loaded: the CPU library, which holds the schemas, is missing"
        else:
            try:
                torch.ops.load_library(str(path))
                status[device] = "loaded"
            except OSError as error:
                status[device] = f"failed to load: {error}"
    return status


def _cuda_compiler(folder: Path) -> str:
    """ "nvcc" and its version; "" if what was built there does not say."""
    try:
        return str(machine.extension(folder).build_info().get("cuda_compiler", ""))
    except ImportError:
        return ""


LIBRARIES = _load()
"""For "cpu" and "cuda": "loaded", or why not."""
