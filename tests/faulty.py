"""A fault at one write, sync or rename of many: a full disk, Ctrl-C, a kill; a write that it hits is half done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

CALLS = ("fsync", "replace", "rename")
FAULTS = ("full disk", "ctrl-c", "kill")


def fails_at(number: int, fault: str, write: Callable[[], object]) -> bool:
    """Whether the call of this number came, and so failed; a kill is that of a forked child."""
    if fault == "kill":
        child = os.fork()
        if child == 0:
            try:
                _run(number, lambda: os._exit(9), write)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return code == 9

    def strike():
        raise OSError(28, "No space left on device") if fault == "full disk" else KeyboardInterrupt

    try:
        _run(number, strike, write)
    except (OSError, KeyboardInterrupt):
        return True
    return False


def _run(number: int, strike: Callable[[], None], write: Callable[[], object]) -> None:
    count = iter(range(10_000))

    def due() -> bool:
        return next(count) == number

    with pytest.MonkeyPatch.context() as patch:
        for name, original in [(name, getattr(os, name)) for name in CALLS]:

            def call(*arguments, original=original, **options):
                if due():
                    strike()
                return original(*arguments, **options)

            patch.setattr(os, name, call)

        def write_bytes(path, data, original=Path.write_bytes):
            if due():
                original(path, data[: len(data) // 2])
                strike()
            return original(path, data)

        def save_file(tensors, path, *arguments, original=safetensors.torch.save_file, **options):
            original(tensors, path, *arguments, **options)
            if due():
                os.truncate(path, os.stat(path).st_size // 2)
                strike()

        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(safetensors.torch, "save_file", save_file)
        write()


def interrupt(method, step: int) -> None:
    """Makes the step of this number, from 0, raise InterruptedError."""
    original = method.step

    def interrupted(batch):
        if int(method.steps) == step:
            raise InterruptedError
        return original(batch)

    method.step = interrupted
