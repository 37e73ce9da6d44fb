"""Image features on disk: what is known of a set's images, row by row, and what a killed process had done.

    key = sha256(model, data set, transforms, dtype)     <cache>/<key>.safetensors           a whole set
                                                         <cache>/<key>-<row>.safetensors     a part, from that row on

    image_features (N, D)    labels (N,)    rows (N, 16)    of (32,)

`rows` tell each image from others, and `of` the model, the transforms and the dtype. So features of a subset, or of a
set that has grown, are found in whichever files hold them. Every file is written whole or not at all, with a checksum;
one that turns out to be damaged is encoded anew.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.data.sources import ROW_BYTES
from robustft.files import read_tensors, write_tensors


class Known(NamedTuple):
    """Features (n, D) and labels (n,) of images that have been encoded."""

    image_features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Kept:
    """The files of one data set in a cache.

    of: what tells models, transforms and dtypes from others. key: the set under these. rows: (N, 16) bytes, of each of
    its images.
    """

    folder: Path
    of: str
    key: str
    rows: Tensor

    @classmethod
    def under(cls, folder: Path, of: tuple[str, ...], data: str, rows: Tensor) -> Kept:
        model, *others = of
        return cls(folder, _sha256(*of), _sha256(model, data, *others), rows)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}.safetensors"

    def whole(self) -> Known | None:
        """The set's features, from its own file."""
        return _read(self.path) if self.path.exists() else None

    def gathered(self) -> tuple[Known, Tensor] | None:
        """Features of those of the set's images that files of other sets hold, and whether each has (N,) bool.

        None where no file holds any; rows that are not known are zero.
        """
        places: dict[bytes, list[int]] = {}
        for place, row in enumerate(self.rows.numpy()):
            places.setdefault(row.tobytes(), []).append(place)
        found: Known | None = None
        have = torch.zeros(len(self.rows), dtype=torch.bool)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name.startswith(self.key):
                continue
            pairs = [
                (place, there)
                for there, row in enumerate(_rows_in(path, self.of))
                for place in places.get(row, ())
                if not have[place]
            ]
            if not pairs or (held := _read(path)) is None:
                continue
            here, there = (torch.tensor(side) for side in zip(*pairs, strict=True))
            if found is None:
                found = Known(
                    torch.zeros(len(have), held.image_features.shape[1]), torch.zeros(len(have), dtype=torch.int64)
                )
            for whole, part in zip(found, held, strict=True):
                whole[here] = part[there]
            have[here] = True
            if bool(have.all()):
                break
        return None if found is None else (found, have)

    def parts(self) -> Iterator[Known]:
        """What a killed process had encoded, from the first row on without a gap."""
        done = 0
        while (path := self._part(done)).exists() and (found := _read(path)) is not None:
            yield found
            done += len(found.labels)

    def keep_part(self, start: int, known: Known) -> None:
        """Writes the features of the images from the row `start` on, if they are finite."""
        if bool(known.image_features.isfinite().all()):
            self._write(self._part(start), known, self.rows[start : start + len(known.labels)])

    def finish(self, known: Known) -> None:
        """Writes the features of the whole set, in the place of its parts."""
        self._write(self.path, known, self.rows)
        for path in self.folder.glob(f"{self.key}-*.safetensors"):
            path.unlink()

    def _part(self, start: int) -> Path:
        return self.folder / f"{self.key}-{start}.safetensors"

    def _write(self, path: Path, known: Known, rows: Tensor) -> None:
        of = torch.tensor(list(bytes.fromhex(self.of)), dtype=torch.uint8)
        tensors = {**known._asdict(), "rows": rows, "of": of}
        write_tensors(path, tensors, {"sha256": _checksum(tensors)})


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("image_features", "labels", "rows", "of"):
        digest.update(f"{name} {tuple(tensors[name].shape)}\0".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _rows_in(path: Path, of: str) -> Iterator[bytes]:
    """The rows of a file, if it is of this model, these transforms and this dtype; none of a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if not {"of", "rows"} <= set(file.keys()) or bytes(file.get_tensor("of").tolist()).hex() != of:
                return
            rows = file.get_tensor("rows").clone()
    except (SafetensorError, OSError, ValueError, TypeError):
        return
    if rows.dtype == torch.uint8 and rows.ndim == 2 and rows.shape[1] == ROW_BYTES:
        yield from (row.tobytes() for row in rows.numpy())


def _read(path: Path) -> Known | None:
    from safetensors import SafetensorError, safe_open

    try:
        stored = read_tensors(path)
        features, labels = stored["image_features"], stored["labels"]
        if (features.ndim, features.dtype) != (2, torch.float32) or not bool(features.isfinite().all()):
            raise ValueError(f"features are {tuple(features.shape)} {features.dtype}; expected finite float32 (N, D)")
        if (labels.shape, labels.dtype) != (features.shape[:1], torch.int64):
            raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected int64 ({len(features)},)")
        if (rows := stored["rows"]).shape != (len(features), ROW_BYTES) or rows.dtype != torch.uint8:
            raise ValueError(
                f"rows are {tuple(rows.shape)} {rows.dtype}; expected uint8 ({len(features)}, {ROW_BYTES})"
            )
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("sha256") != _checksum(stored):
                raise ValueError("its content has another checksum than it holds")
        return Known(features, labels)
    except (SafetensorError, KeyError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}); encoding again", RuntimeWarning, stacklevel=5)
        return None
