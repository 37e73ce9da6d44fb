"""Files that are whole or as they were, and hold numbers and JSON, never code.

A fitted object is one safetensors file: its tensors, and as metadata one JSON text {"kind": ..., **settings}. One key,
because the order in which safetensors writes several is not reproducible: equal objects are equal bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_KEY = "robustft"

# What may lie beside an exported model; none of it is weights.
DETECTOR_FILE = "detector.safetensors"
CALIBRATOR_FILE = "calibrator.safetensors"


def save_fitted(path: Path, kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a fitted object; `kind` is what `load_fitted` will ask for."""
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory.
    owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(owned, metadata={_KEY: json.dumps({"kind": kind, **settings})}))


def place(path: str | Path, name: str) -> Path:
    """The file `path`, or `name` in it where it is a directory."""
    path = Path(path)
    return path / name if path.is_dir() else path


def fitted_kind(path: Path) -> str:
    """The kind of what `save_fitted` wrote; ValueError for a file that holds none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return str(json.loads((file.metadata() or {})[_KEY])["kind"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or nothing saved by robustft: {error!r:.200}") from error


def load_fitted(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of what `save_fitted` wrote; ValueError for a damaged file or another kind."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a {kind} saved by robustft")
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})[_KEY])
            # Copies: the file's own memory is aligned to 8 bytes, and products of it can differ in their last bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        found = settings.pop("kind")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no {kind} saved by robustft: {error!r:.200}") from error
    if found != kind:
        raise ValueError(f"{path}: holds a {found}, expected a {kind}")
    return settings, tensors


def read_text(path: str | Path, expected: str) -> str:
    """A UTF-8 file's text, without the mark that some editors begin it with; ValueError, naming it and what was
    `expected`, for other bytes."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ValueError(f"{path}: no UTF-8 text ({found}); expected {expected}") from error


def read_json(path: str | Path, expected: str) -> Any:
    """A JSON file's value; ValueError, naming the file and what was `expected`, for anything else.

    An object that has a key twice is refused: of the two values, one would be lost unseen.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"duplicate keys {', '.join(map(repr, twice[:5]))}{', ...' if len(twice) > 5 else ''}")
        return dict(pairs)

    text = read_text(path, expected)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; expected {expected}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: JSON nested too deeply; expected {expected}") from error
    except ValueError as error:  # twice the same key, a number of thousands of digits
        raise ValueError(f"{path}: {error}; expected {expected}") from error


def write_file(path: Path, data: bytes) -> None:
    """Writes a file under another name in its folder, made if need be, and renames it: it is whole or as it
    was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
