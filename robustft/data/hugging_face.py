"""Hugging Face's datasets, as this package's data sets are: (image, label), or a dictionary with a caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustft.data.classes import ClassNames
from robustft.data.images import DamagedImageError, OnError, as_rgb, check_on_error

IMAGE, LABEL, TEXT = ("image", "img"), ("label", "labels", "fine_label"), ("text", "caption", "title")


@dataclass(frozen=True, eq=False)
class HuggingFaceDataset:
    """A `datasets.Dataset` with an image column and a label (`ClassLabel`) or caption column.

    ValueError, saying `where`, for one without.
    """

    rows: Any
    where: str
    transform: Callable[[Any], Any] | None = None
    names: tuple[str, ...] | None = None
    workers: int | None = None  # as in `PathDataset`
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        check_on_error(self.on_error)
        if self._column(IMAGE) is None:
            raise ValueError(f"{self.where}: no column {' or '.join(IMAGE)}; the columns are {self.rows.column_names}")
        if self._column(LABEL) is None and self._column(TEXT) is None:
            raise ValueError(f"{self.where}: no label and no caption; the columns are {self.rows.column_names}")

    @property
    def classes(self) -> tuple[str, ...]:
        label = self._column(LABEL)
        if self.names is not None or label is None:
            return self.names or ()
        named = getattr(self.rows.features[label], "names", None)
        return tuple(named) if named else tuple(map(str, range(int(self.labels.max()) + 1)))

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        label = self._column(LABEL)
        return torch.tensor(self.rows[label] if label else [-1] * len(self.rows), dtype=torch.int64)

    @property
    def fingerprint(self) -> str:
        return str(self.rows._fingerprint)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            row = self.rows[int(index)]
            image = as_rgb(row[self._column(IMAGE)], f"{self.where}, row {index}")
        except (IndexError, DamagedImageError):  # beyond the last row; of pixels whose range nothing tells
            raise
        except Exception as error:  # of a damaged image or table, a decoder may raise anything
            raise DamagedImageError(f"{self.where}, row {index}: damaged, or no image: {error!r:.200}") from error
        image = image if self.transform is None else self.transform(image)
        label, text = self._column(LABEL), self._column(TEXT)
        if text is None:
            return image, row[label]
        return {"image": image, "text": row[text]} | ({} if label is None else {"label": row[label]})

    def subset(self, indices: Sequence[int] | Tensor) -> HuggingFaceDataset:
        return replace(self, rows=self.rows.select([int(index) for index in indices]))

    def with_transform(self, transform: Callable[[Any], Any] | None) -> HuggingFaceDataset:
        return replace(self, transform=transform)

    def renamed(self, names: Mapping[str, str]) -> HuggingFaceDataset:
        return replace(self, names=ClassNames(self.classes).renamed(names[name] for name in self.classes))

    def _column(self, usual: Sequence[str]) -> str | None:
        return next((name for name in usual if name in self.rows.column_names), None)
