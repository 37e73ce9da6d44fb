"""Checkpoints that are whole or absent: `<folder>/step_00000120/{state.safetensors, state.json, SHA256}`, and the best
weights so far, `<folder>/best/step_00000080/` of the same files.

A checkpoint is written under a temporary name and renamed, so a kill or a full disk at any moment leaves those before
it as they were. SHA256 holds the checksums of the other two (`sha256sum -c` reads it). The last two checkpoints are
kept: should the newest be damaged, in a single bit, the other takes its place. So are the best weights that either of
them speaks of, beside the newest best. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from robustft.files import new_folder, read_tensors, write_json, write_tensors, write_text

KEEP = 2
BEST = "best"
STATE, META, CHECKSUMS = "state.safetensors", "state.json", "SHA256"
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
    final = _write(folder, step, tensors, meta)
    for old in _steps(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    _keep_best(folder)
    return final


def save_best(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the best weights, those of a step; a checkpoint that speaks of others keeps those. Errors likewise."""
    final = _write(folder / BEST, step, tensors, meta)
    _keep_best(folder, final)
    return final


def best_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The best weights of a run, which a checkpoint says are those of `step`; OSError if they are not whole."""
    path = _step_folder(folder / BEST, step)
    try:
        return load_checkpoint(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the best weights so far, {path}, are missing or damaged: {error}") from error


def _keep_best(folder: Path, *kept: Path) -> None:
    """Removes best weights, but those that the checkpoints speak of, and these."""
    spoken_of = set(kept)
    for path in _steps(folder):
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # damaged, or without any
            spoken_of.add(_step_folder(folder / BEST, _read_meta(path / META)["validation"]["best"][0]))
    for old in set(_steps(folder / BEST)) - spoken_of:
        shutil.rmtree(old, ignore_errors=True)


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    final = _step_folder(folder, step)
    try:
        with new_folder(final) as fresh:
            write_tensors(fresh / STATE, tensors)
            write_json(fresh / META, {"step": step, **meta})
            write_text(fresh / CHECKSUMS, _checksums(fresh))
    except OSError as error:
        rest = ", ".join(path.name for path in _steps(folder)) or "none"
        raise OSError(f"cannot write checkpoint {final}: {error} (still whole: {rest})") from error
    return final


def discard_unfinished(folder: Path, step: int = 0) -> None:
    """Removes what a run that was killed has left of a checkpoint that it was writing or removing, and the best weights
    after `step`, where it is to go on."""
    later = (path for path in _steps(folder / BEST) if path > _step_folder(folder / BEST, step))
    for path in (*folder.glob(".step_*"), *folder.glob(f"{BEST}/.step_*"), *later, *_steps(folder)[KEEP:]):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder; ValueError if pickled, OSError or SafetensorError if not as it was written."""
    if path.suffix in PICKLED:
        raise ValueError(f"{path} is a pickled checkpoint: loading one runs whatever code it holds, so it is refused")
    state = path / STATE
    with state.open("rb") as file:
        head = file.read(9)
        # safetensors opens with its header's length, any 8 bytes, and the header's brace.
        if head.startswith(PICKLE_MAGIC) and head[8:] != b"{":
            raise ValueError(
                f"{state} is a pickle under another name: loading one runs code it holds, so it is refused"
            )
    if (path / CHECKSUMS).read_bytes() != _checksums(path).encode():
        raise OSError(f"{path} is damaged: its files have other checksums than in {CHECKSUMS}")
    meta = _read_meta(path / META)
    if path != _step_folder(path.parent, meta["step"]):
        raise OSError(f"{path} is damaged: it holds step {meta['step']}")
    return Checkpoint(path, meta["step"], read_tensors(state), meta)


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


def _checksums(path: Path) -> str:
    lines = []
    for name in (META, STATE):
        digest = hashlib.sha256()
        with (path / name).open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)
