"""Which body computes an operator: the compiled one where there is one, else the eager reference.

The choice is `ROBUSTFT_BACKEND` (auto, reference, native, triton, cuda) or, within a block, `robustft.backend(...)`.
It is the package's only global state.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from robustft import machine
from robustft.ops import native, triton
from robustft.ops.native.registration import library

BACKENDS = ("auto", "reference", "native", "triton", "cuda")
ISA_NAMES = ("portable", "avx2", "avx512", "amx")


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


_choice = _checked(os.environ.get("ROBUSTFT_BACKEND", "auto"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Computes with the named backend inside a `with` block: auto, reference, native, triton or cuda."""
    global _choice
    previous, _choice = _choice, _checked(name)
    try:
        yield
    finally:
        _choice = previous


def _load_libraries() -> dict[str, str]:
    wanted = os.environ.get("ROBUSTFT_CPU_ISA")
    if wanted is not None and wanted not in ISA_NAMES:
        raise ValueError(f"ROBUSTFT_CPU_ISA is {wanted!r}; expected one of {', '.join(ISA_NAMES)}")
    status = {}
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


# Loaded when imported, so that nothing is left to do, or for torch.compile to trace, when a loss is computed.
LIBRARIES = _load_libraries()
"""For "cpu" and "cuda": "loaded", or why not."""

if LIBRARIES["cpu"] == "loaded":
    native.register()
    triton.register(library)


def _has_kernel(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"robustft::{op}", device.upper())


_KERNELS = {
    (op, device): LIBRARIES["cpu"] == "loaded"
    and (_has_kernel(op, device) or _has_kernel(native.COMPOSED.get(op, op), device))
    for op in (*native.KERNELS, *native.COMPOSED)
    for device in LIBRARIES
}


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def use_native(op: str, device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """Whether `op` runs compiled on this device, for features of this dtype; warns once where it was to be expected."""
    if _choice == "reference":
        return False
    by_triton = triton.computes(op, device)
    # "native" is the compiled body of any device; "triton" and "cuda" name a GPU's.
    suits = _choice in ("auto", "native")
    suits |= by_triton if _choice == "triton" else _choice == "cuda" and device.type == "cuda" and not by_triton
    exists = _KERNELS.get((op, device.type), False)
    if suits and exists and (not by_triton or triton.computes(op, device, dtype)):
        return True
    tensors = f"{device.type} tensors" if dtype is None else f"{device.type} tensors of {dtype}"
    if _choice == "auto":
        if torch.compiler.is_compiling():  # a warning would break the graph
            return False
        why = LIBRARIES.get(device.type, "does not exist for this device type")
        if why == "loaded" and (lacking := triton.lacking(op, device)):
            why = f"needs Triton for the losses, and {lacking}"  # no operator in it: one warning for all
        reason = f"has no kernel of {op} for {tensors}" if exists or why == "loaded" else why
        _warn_once(
            f"robustft's compiled library for {device.type} {reason}; using the eager reference, which is slower and "
            "stores N x N matrices. `robustft doctor` tells more."
        )
        return False
    raise RuntimeError(f"backend is {_choice!r}, but there is no such kernel of {op} for {tensors}")


def build_info() -> dict[str, Any]:
    """What was compiled, with what, what this processor has, and which libraries are loaded."""
    try:
        built = machine.extension(machine.compiled_folder())
    except ImportError as error:
        return {"native": False, "reason": str(error), "libraries": LIBRARIES}
    return {
        "native": LIBRARIES["cpu"] == "loaded",
        **built.build_info(),
        "detected_isa": built.detected_isa(),
        "active_isa": built.active_isa(),
        "libraries": LIBRARIES,
        "triton": triton.STATUS,
        "torch": torch.__version__,
    }
