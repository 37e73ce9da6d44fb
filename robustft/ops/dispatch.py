"""Which body computes an operator for these tensors: compiled code or Triton where there is one, else the reference.

The choice is `ROBUSTFT_BACKEND` (auto, reference, native, triton, cuda) or, within a block, `robustft.backend(...)`.
It is the package's only state, and each thread's and task's own.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robustft import machine
from robustft.ops import accelerator, registry
from robustft.ops.libraries import LIBRARIES
from robustft.ops.registry import Body

BACKENDS = ("auto", "reference", "native", "triton", "cuda")


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


_default = _checked(os.environ.get("ROBUSTFT_BACKEND", "auto"))
_choice: ContextVar[str] = ContextVar("robustft.backend", default=_default)


class _Traced:
    """The choice as torch.compile reads it and guards by: of a ContextVar not every torch that is supported can."""

    choice = _default


class _TracedInThread(_Traced, threading.local):
    """Of each thread its own."""


# torch 2.11 guards by no attribute of a thread-local object; 2.14 does (those between were not tried). There, code that
# two threads compile at once under different backends may follow the other's until that thread leaves its block.
_traced = _TracedInThread() if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) else _Traced()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Computes with the named backend inside a `with` block: auto, reference, native, triton or cuda.

    The choice holds in the thread, or asyncio task, that makes it; a thread started in the block begins with the
    default, unless it runs in a copy of the context (`contextvars.copy_context().run`).
    """
    token = _choice.set(_checked(name))
    _traced.choice = name
    try:
        yield
    finally:
        _choice.reset(token)
        _traced.choice = _choice.get()


def chosen() -> str:
    """The backend's name: `robustft.backend`'s here, else the environment's."""
    return _traced.choice if torch.compiler.is_compiling() else _choice.get()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=6)


def body_of(op: str, tensor: Tensor) -> Body:
    """What computes `op` for tensors like this one under the chosen backend; warns once where more was to be expected.

    RuntimeError where a backend was asked for by name that has no such kernel.
    """
    choice = chosen()
    if choice == "reference":
        return "reference"
    traced = torch.compiler.is_compiling()
    if not traced and torch._C._are_functorch_transforms_active():
        if choice != "auto":
            raise RuntimeError(
                f"backend is {choice!r}, whose kernels torch.func cannot transform; robustft.backend('reference') can"
            )
        _warn_once("torch.func cannot transform robustft's kernels; using the eager reference, which is slower")
        return "reference"
    if choice == "auto" and tensor.is_cpu and registry.BODIES.get((op, "cpu")) == "compiled":
        return "compiled"  # as below, and most often
    device, dtype = tensor.device, tensor.dtype
    if device.type == "meta":  # shapes, by the operators' fakes where these are declared
        return "compiled" if LIBRARIES["cpu"] == "loaded" else "reference"
    found = registry.body(op, device, dtype)
    if found != "reference" and _suits(choice, found, device):
        return found
    tensors = f"{device.type} tensors of {dtype}"
    if choice != "auto":
        raise RuntimeError(f"backend is {choice!r}, but there is no such kernel of {op} for {tensors}")
    if not traced:  # a warning would break the graph
        _warn_once(
            f"robustft's compiled library for {device.type} {_lacks(op, device, tensors)}; using the eager reference, "
            "which is slower and stores N x N matrices. `robustft doctor` tells more."
        )
    return "reference"


def _suits(choice: str, found: Body, device: torch.device) -> bool:
    """ "native" is the compiled body of any device; "triton" and "cuda" name a GPU's."""
    match choice:
        case "triton":
            return found == "triton"
        case "cuda":
            return found == "compiled" and device.type == "cuda"
        case _:
            return True


def _lacks(op: str, device: torch.device, tensors: str) -> str:
    why = LIBRARIES.get(device.type, "does not exist for this device type")
    if why != "loaded":
        return why
    if device.type != "cpu" and registry.OPERATORS[op].by_triton and (lacking := accelerator.lacking(device)):
        return f"needs Triton for the losses, and {lacking}"  # no operator in it: one warning for all
    return f"has no kernel of {op} for {tensors}"


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
        "triton": accelerator.STATUS,
        "torch": torch.__version__,
    }
