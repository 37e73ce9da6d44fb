"""Files on their way to disk, in one way: whole or as they were, and of numbers, text and JSON, never code.

    write_file, write_text, write_json, write_tensors    one file
    new_folder                                           a folder, of whatever is written into it
    append_line, growing, move                           a record more; lines as they come; another name for a file
    locked                                               one process at a time

A file is written under another name in its folder, synced and renamed, so that a kill, a full disk or a cut of power
at any moment leaves the file as it was or as it is to be. Folders are made. Modes are those that the umask gives. Equal
content is equal bytes.

A fitted object is one safetensors file: its tensors, and as metadata one JSON text {"checksum", "kind", **settings}.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor

_KEY, _CHECKSUM = "robustft", "checksum"
_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{12}(\.old)?")  # the names that `_beside` and `new_folder` give

# What may lie beside an exported model; none of it is weights.
DETECTOR_FILE = "detector.safetensors"
CALIBRATOR_FILE = "calibrator.safetensors"
CONFORMAL_FILE = "conformal.safetensors"
COMPANIONS = (DETECTOR_FILE, CALIBRATOR_FILE, CONFORMAL_FILE)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file of these bytes."""
    with _new_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a file of this text, in UTF-8."""
    write_file(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = None, allow_nan: bool = True) -> None:
    """Writes a value that JSON can hold, one row a line or indented; `allow_nan` False raises ValueError for NaN and
    infinity."""
    text = json.dumps(value, indent=indent, allow_nan=allow_nan)
    write_text(path, (text if indent else json_text(json.loads(text))) + "\n")


_LINE = 400
"""Characters that nested lists and dictionaries may have to stay in one line of `json_text`."""


def json_text(value: Any, indent: int = 0) -> str:
    """One row a line: what holds numbers and words alone stays in one line, and so does what is short."""
    line = json.dumps(value)
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if len(line) + indent <= _LINE or not any(isinstance(item, (dict, list)) for item in items):
        return line
    rows = [json_text(item, indent + 1) for item in items]
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {row}" for key, row in zip(value, rows, strict=True)]
    margin = "\n" + " " * indent
    return line[0] + ",".join(f"{margin} {row}" for row in rows) + margin + line[-1]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; memory: one copy of the tensors on the CPU.

    ValueError for several metadata: the order in which safetensors writes them changes from process to process.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if metadata is not None and len(metadata) > 1:
        raise ValueError(f"metadata must have one key, whose value may be JSON, got {sorted(metadata)}")
    # Copies, because safetensors refuses tensors that share memory.
    owned = {
        name: torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format).copy_(x.detach())
        for name, x in tensors.items()
    }
    with _new_file(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(owned, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(mode & 0o777)  # safetensors makes a file of its own, the owner's alone


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which in the end takes the place of `path` and of what lies there.

    Nothing is left of it after an error. A kill between the two renames that replace a folder leaves the earlier one
    beside its place, under a hidden name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path)
    try:
        fresh.mkdir()
        yield fresh
        for entry in (*fresh.rglob("*"), fresh):
            _sync(entry)
        _replace_folder(path, fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file: all that a kill can leave of it is a last line cut short."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def growing(path: Path) -> Iterator[TextIO]:
    """A text file that is added to as its lines are made: all that a kill can leave of it is a last line cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="", buffering=1) as file:
        yield file


def cut_to_lines(path: Path, expected: str) -> list[str]:
    """The whole lines of a file that `growing` wrote; a last one that is cut short is taken from it."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    try:
        return content[:end].decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text; expected {expected}") from error


def move(source: Path, target: Path) -> None:
    """Renames a whole file within its file system, over `target` if that is there."""
    os.replace(source, target)
    _sync(target.parent)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` against all other processes and threads.

    The lock dies with its process, however that ends, and the file goes with it or is taken over. BlockingIOError
    where somebody else holds it, unless this is to `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path, wait)
    _held.add(handle)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(handle)
        os.close(handle)


def _lock(path: Path, wait: bool) -> int:
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held it may have removed the file, which somebody else has made anew.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            os.close(handle)
            raise BlockingIOError(
                f"{path.parent} is in use by another run (process {owner}): wait until it has ended, or choose another "
                "folder"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


_held: set[int] = set()  # a forked child, such as a loader of data, would keep its parent's locks


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def is_unfinished(path: Path) -> bool:
    """Whether this is what a kill has left of an attempt to write a file or a folder beside it."""
    return _UNFINISHED.fullmatch(path.name) is not None


def clear_unfinished(folder: Path) -> None:
    """Removes what kills have left of files and folders that were being written anywhere below a folder, and puts back
    a folder that was to be replaced. Nobody else may be writing there."""
    for path in sorted(filter(is_unfinished, folder.rglob(".*"))):
        found = _UNFINISHED.fullmatch(path.name)
        if found is None or not path.exists():  # it lay in one that is gone
            continue
        if found[2] and not (place := path.with_name(found[1])).exists():
            os.rename(path, place)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_text(path: str | Path, expected: str) -> str:
    """A UTF-8 file's text, without the mark that some editors begin it with; ValueError, naming it and what was
    `expected`, for other bytes."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder; expected a file with {expected}")
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, in memory of their own; SafetensorError for another file.

    What safetensors gives are the file's own pages: whoever rewrites the file changes them, whoever cuts it short kills
    the process that reads them. They are also aligned to 8 bytes, and products of them can differ in their last bits.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def save_fitted(path: Path, kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a fitted object; `kind` is what `load_fitted` will ask for. ValueError for a setting that is NaN."""
    try:
        text = json.dumps({"kind": kind, **settings}, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: the settings of a {kind} must be finite numbers, got {settings!r:.200}") from error
    write_tensors(
        path, tensors, {_KEY: json.dumps({_CHECKSUM: content_checksum(json.loads(text), tensors), **json.loads(text)})}
    )


def content_checksum(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of a fitted object's settings and tensors: a single wrong bit in a file is a plausible wrong number else."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def place(path: str | Path, name: str) -> Path:
    """The file `path`, or `name` in it where it is a directory."""
    path = Path(path)
    return path / name if path.is_dir() else path


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Around what is made of a file's content: an error becomes a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: damaged, or no {kind} that this version knows: {error}") from error


def fitted_kind(path: Path) -> str:
    """The kind of what `save_fitted` wrote; ValueError for a file that holds none."""
    return _read_fitted(path, "object")[0]


def load_fitted(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of what `save_fitted` wrote.

    ValueError, naming the file, for a damaged one, another kind, NaN in it, and when something is asked of the
    dictionaries that they do not hold.
    """
    found, settings, tensors = _read_fitted(path, kind)
    if found != kind:
        raise ValueError(f"{path}: holds a {found}, expected a {kind}")
    for name, value in tensors.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(f"{path}: {name} of the {kind} must be finite, but holds NaN")
    return _Found(path, settings), _Found(path, tensors)


class _Found(dict[str, Any]):
    """What a file holds; asked for more, it says which file lacks it."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(f"{self.path}: damaged, or of another version of robustft: it holds no {name!r}")


def _read_fitted(path: Path, kind: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a {kind} saved by robustft")
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})[_KEY], parse_constant=_refuse)
        tensors = read_tensors(path)
        if settings.pop(_CHECKSUM) != content_checksum(settings, tensors):
            raise ValueError("its content has another checksum than it holds")
        found = settings.pop("kind")
        if not isinstance(found, str):
            raise TypeError(f"kind is {found!r:.80}")
    except (SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no {kind} saved by robustft: {error!r:.200}") from error
    return found, settings, tensors


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"a setting is {constant}")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, of the mode that the umask gives, which in the end takes its place."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; expected the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    # The kernel applies the umask. To ask for it is to set it, for every thread of the process.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _replace_folder(path: Path, fresh: Path) -> None:
    if not path.exists():
        os.rename(fresh, path)
        return
    old = fresh.with_name(f"{fresh.name}.old")
    os.rename(path, old)
    try:
        os.rename(fresh, path)
    except BaseException:  # Ctrl-C too, which may also come after the renaming
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)
        raise
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
