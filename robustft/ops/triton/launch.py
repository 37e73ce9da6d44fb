"""How a kernel is launched: on the tensors' device, or, for tests and tables of resources, recorded instead of run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
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


_compiled: dict[Hashable, Any] = {}
"""Kernels as compiled for arguments of some kind, by `_kind`."""


@cache
def _parameters(kernel) -> list[tuple[str, bool, bool]]:
    """Names in order; whether it is a constant; whether the kernel is compiled anew for some of its values."""
    return [(p.name, p.is_constexpr, not p.do_not_specialize) for p in kernel.params]


def _kind(kernel, values: list[Any], options: tuple[int, int], device: torch.device) -> Hashable:
    """All that Triton compiles a kernel anew for, in classes no coarser than its own: types, constants, whether
    pointers and numbers are multiples of 16, whether numbers are 1 or take more than 32 bits."""
    kinds: list[Hashable] = [id(kernel), device, options]
    add = kinds.append
    for (_, constant, specialised), value in zip(_parameters(kernel), values, strict=True):
        if constant or value is None:
            add(value)
        elif type(value) is int:
            add((value >> 31, value & 15, value == 1) if specialised else value >> 31)
        elif isinstance(value, Tensor):
            add(value.dtype)
            add(value.data_ptr() & 15)
        else:
            add(type(value).__name__)
    return tuple(kinds)


def launch(kernel, programs: int, arguments: Mapping[str, Any], *, warps: int, stages: int = 1) -> None:
    """Runs `programs` programs of the kernel on its first argument's device.

    Triton takes 0.15 ms on an H200's host to find the compiled kernel that suits so many arguments; all kernels of a
    loss on 512 pairs take 0.02. So what it found is kept here, by the same distinctions, and called as it was compiled.
    """
    # Fused multiply-adds by name: their default changes with Triton 3.10, and with it the last bits of a result.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if _recording is not None:
        _recording[1].append(Launch(kernel, programs, arguments, options))
        return
    first: Tensor = next(iter(arguments.values()))
    if INTERPRETED:
        kernel[(programs,)](**arguments, **options)
    elif first.device.index == torch.cuda.current_device():
        _launch(kernel, programs, arguments, options, first.device)
    else:
        with torch.cuda.device_of(first):
            _launch(kernel, programs, arguments, options, first.device)


def _launch(kernel, programs: int, arguments: Mapping[str, Any], options: dict[str, Any], device: torch.device) -> None:
    values = [arguments[name] for name, *_ in _parameters(kernel)]
    kind = _kind(kernel, values, (options["num_warps"], options["num_stages"]), device)
    compiled = _compiled.get(kind)
    if compiled is None:
        _compiled[kind] = kernel[(programs,)](**arguments, **options)
    else:
        compiled[(programs, 1, 1)](*values)
