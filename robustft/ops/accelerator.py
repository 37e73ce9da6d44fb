"""For which tensors the bodies in robustft/ops/triton are, and whether Triton is here at all.

Which operators have one says the registry, which registers them. Triton itself is imported when the first of them runs.
Under TRITON_INTERPRET=1 they are registered for CPU tensors, which Triton's interpreter computes with: so they are
tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def status() -> str:
    """ "registered", or why nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.cuda is None and not INTERPRETED:
        return "this torch has no CUDA"
    return "registered"


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bodies that are registered for the device compute such tensors on it."""
    return dtype in DTYPES and _compiles_for(device)


def lacking(device: torch.device) -> str | None:
    """Why operators that have Triton bodies are not computed by them on a device where others are."""
    if STATUS != "registered":
        return STATUS
    return None if _compiles_for(device) else "Triton before 3.8 does not compile for sm_100"


@cache
def architecture(device: torch.device) -> str:
    """Whose configurations a device takes. sm_120 has no tensor memory and takes those of sm_80."""
    if not torch.cuda.is_available():
        return "sm_80"  # the tensors are fakes
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def _compiles_for(device: torch.device) -> bool:
    # Before Triton 3.8 its compiler fails at every tile that is reduced out of sm_100's tensor memory.
    return INTERPRETED or TENSOR_MEMORY or architecture(device) != "sm_100"


# What torch.compiler.assume_constant_result sets. Calling that imports torch._dynamo, which takes a second.
_compiles_for.__dict__["_dynamo_marked_constant"] = True


def body(module: str, op: str) -> Callable:
    """The function `op` of a module in robustft/ops/triton, which is imported when it is first called."""

    def body(*arguments):
        return getattr(import_module(f"robustft.ops.triton.{module}"), op)(*arguments)

    return body


STATUS = status()
TENSOR_MEMORY = STATUS == "registered" and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
"""Whether this Triton compiles the kernels for sm_100."""
