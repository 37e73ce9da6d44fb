"""How a kernel is launched: on the tensors' device, or, for tests and tables of resources, recorded instead of run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustft.ops import accelerator
from robustft.ops.accelerator import INTERPRETED


class Launch(NamedTuple):
    """A launch as recorded: the kernel, the number of programs, its arguments by name and its options."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, object]


_recording: tuple[str, list[Launch]] | None = None


@contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """Launches in this block are listed as for that architecture, and not run: their tensors may be meta tensors."""
    global _recording
    _recording = architecture, []
    try:
        yield _recording[1]
    finally:
        _recording = None


def architecture(device: torch.device) -> str:
    """Of the table in configs.py: the device's, or "interpreter"."""
    if _recording is not None:
        return _recording[0]
    return "interpreter" if INTERPRETED else accelerator.architecture(device)


def addressable(features: Tensor) -> Tensor:
    """With adjacent columns, and rows near enough for offsets of 32 bits within 128 of them: a copy of others."""
    if features.stride(1) == 1 and features.stride(0) < 2**24:
        return features
    return features.clone(memory_format=torch.contiguous_format)


def launch(kernel, programs: int, arguments: Mapping[str, Any], *, warps: int, stages: int = 1) -> None:
    """Runs `programs` programs of the kernel on its first argument's device."""
    # Fused multiply-adds by name: their default changes with Triton 3.10, and with it the last bits of a result.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if _recording is not None:
        _recording[1].append(Launch(kernel, programs, arguments, options))
        return
    first: Tensor = next(iter(arguments.values()))
    with torch.cuda.device_of(first):
        kernel[(programs,)](**arguments, **options)
