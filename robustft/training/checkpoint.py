"""Checkpoints that are whole or absent: `<folder>/step_00000120/{state.safetensors, state.json}`.

Both files are written and synced under a temporary name, then the folder is renamed, so a kill or a full disk
at any moment leaves the checkpoints before it as they were. The last two are kept: should the newest be
damaged, the other takes its place. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP = 2
PICKLED = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80")  # torch.save's zip archive; a bare pickle


class Checkpoint(NamedTuple):
    """A saved state: where it lies, its step, its tensors by name, and what JSON can hold."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step and keep the newest two; OSError, the others intact, if it fails."""
    final, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Own storage for each name: safetensors refuses tensors that share memory.
        owned = {
            name: torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format).copy_(x)
            for name, x in tensors.items()
        }
        save_file(owned, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **meta}, indent=1))
        for file in temporary.iterdir():
            _sync(file)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        rest = ", ".join(path.name for path in _steps(folder)) or "none"
        raise OSError(f"cannot write checkpoint {final}: {error} (still whole: {rest})") from error
    for old in _steps(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder; ValueError if pickled, OSError or SafetensorError if not whole."""
    if path.suffix in PICKLED:
        raise ValueError(f"{path} is a pickled checkpoint: loading one runs whatever code it holds, so it is refused")
    state = path / "state.safetensors"
    with state.open("rb") as file:
        head = file.read(9)
        # safetensors opens with its header's length, any 8 bytes, and the header's brace.
        if head.startswith(PICKLE_MAGIC) and head[8:] != b"{":
            raise ValueError(
                f"{state} is a pickle under another name: loading one runs code it holds, so it is refused"
            )
    meta = _read_meta(path / "state.json")
    return Checkpoint(path, meta["step"], load_file(state), meta)


def latest_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint, warning of newer ones that are not; FileNotFoundError if there is none."""
    damaged = []
    for path in _steps(folder):
        try:
            checkpoint = load_checkpoint(path)
        except (OSError, SafetensorError) as error:
            damaged.append(f"{path.name}: {error}")
            continue
        if damaged:
            warnings.warn(f"resuming from {path}, because of damaged checkpoints: {'; '.join(damaged)}", stacklevel=3)
        return checkpoint
    if damaged:
        raise FileNotFoundError(f"no checkpoint in {folder} is whole: {'; '.join(damaged)}")
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLED) if folder.is_dir() else []
    if pickled:
        raise ValueError(f"{folder} holds pickled checkpoints only ({', '.join(pickled[:3])}): these are refused")
    raise FileNotFoundError(f"there is no checkpoint in {folder} to resume from")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets without end
        raise OSError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict) or type(meta.get("step")) is not int:
        raise OSError(f"{path} is damaged: expected an object with a step, got {meta!r:.80}")
    return meta


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
