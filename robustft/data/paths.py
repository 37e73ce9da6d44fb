"""Images that stay files: their paths, labels, captions and groups, read one by one as they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from robustft.data.classes import ClassNames, few
from robustft.data.images import DamagedImageError, OnError, check_on_error, read_image
from robustft.ops.kinds import checked, described

if TYPE_CHECKING:
    import PIL.Image

UNLABELLED = -1  # of images of no class, as OpenOOD's lists have it


class Member(NamedTuple):
    """A file inside an uncompressed tar archive, where it begins there, and its bytes."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """The file's content; OSError where the archive cannot be read, DamagedImageError where it has become
        shorter."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise DamagedImageError(f"{self}: the archive ends inside it")
        return content


def read_file(file: Path | Member) -> PIL.Image.Image:
    """The image of a path or of an archive's member, as `read_image` gives it."""
    return read_image(str(file), file.read()) if isinstance(file, Member) else read_image(file)


@dataclass(frozen=True, eq=False)
class PathDataset:
    """Image files with labels into `classes`; an item is (transformed RGB image, label).

    With `texts` or `groups` an item is {"image", "label", "text", "group"}, of what there is. A label of -1 is of no
    class: an image with a caption only, or an out-of-distribution one.

    Args:
        samples: (file, label), N of them; a file is a path or a `Member` of an archive.
        classes: their names.
        transform: of the image, such as a model's.
        texts: N captions. groups: (N,) int64, of `group_names`.
        workers: processes that read it in order, None for one a core (`robustft.data.sources.reading_workers`).
        on_error: "skip" lets `robustft.data.sources` go on without images that cannot be read, and count them; an item
            that is asked for by itself raises all the same.
    """

    samples: tuple[tuple[Path | Member, int], ...]
    classes: tuple[str, ...]
    transform: Callable[[Any], Any] | None = None
    texts: tuple[str, ...] | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    workers: int | None = None
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        check_on_error(self.on_error)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.tensor([label for _, label in self.samples], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        file, label = self.samples[index]
        image = read_file(file)
        image = image if self.transform is None else self.transform(image)
        if self.texts is None and self.groups is None:
            return image, label
        item = {"image": image}
        if label != UNLABELLED:
            item["label"] = label
        if self.texts is not None:
            item["text"] = self.texts[index]
        if self.groups is not None:
            item["group"] = int(self.groups[index])
        return item

    @checked
    def subset(self, indices: Sequence[int] | Tensor) -> PathDataset:
        """The samples at `indices`, in that order."""
        if isinstance(indices, Tensor) and indices.ndim != 1:
            raise ValueError(f"indices is {described(indices)}; expected (n,)")
        rows = [int(index) for index in indices]
        return replace(
            self,
            samples=tuple(self.samples[row] for row in rows),
            texts=None if self.texts is None else tuple(self.texts[row] for row in rows),
            groups=None if self.groups is None else self.groups[rows],
        )

    def with_transform(self, transform: Callable[[Any], Any] | None) -> PathDataset:
        """The same files under another transform."""
        return replace(self, transform=transform)

    @checked
    def renamed(self, names: Mapping[str, str] | Sequence[str]) -> PathDataset:
        """The same files under other class names: one for each class, by its name or in the order of the classes.

        ValueError for a class without a new name, and for a list of another length.
        """
        if not isinstance(names, Mapping):
            if len(names) != len(self.classes):
                raise ValueError(
                    f"class_names holds {len(names)} names for the {len(self.classes)} classes {few(self.classes)}: "
                    "expected one for each, in their order, or a mapping"
                )
            return replace(self, classes=ClassNames(self.classes).renamed(names))
        if missing := [name for name in self.classes if name not in names]:
            raise ValueError(f"class_names has no name for {few(missing)}, of the data set's {len(self.classes)}")
        return replace(self, classes=ClassNames(self.classes).renamed(names[name] for name in self.classes))

    @checked
    def relabelled(self, classes: Sequence[str]) -> PathDataset:
        """The same files with labels into `classes`, by name; all of the data set's names are among them."""
        place = {name: index for index, name in enumerate(classes)}
        if missing := [name for name in self.classes if name not in place]:
            raise ValueError(f"{few(missing)} are not among the {len(place)} classes")
        samples = tuple(
            (file, label if label == UNLABELLED else place[self.classes[label]]) for file, label in self.samples
        )
        return replace(self, samples=samples, classes=ClassNames(classes))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of files (by path, size and time of change), labels, captions and groups: a cache key."""
        digest = hashlib.sha256(repr((self.classes, self.texts)).encode())
        if self.groups is not None:
            digest.update(self.groups.numpy().tobytes())
        for file, label in self.samples:
            place = file.offset if isinstance(file, Member) else 0
            try:
                status = os.stat(file.archive if isinstance(file, Member) else file)
            except OSError:
                if self.on_error == "raise":
                    raise
                digest.update(f"{file}\0{place}\0{label}\0missing\n".encode())
                continue
            digest.update(f"{file}\0{place}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Samples of each class, by name, in the order of the classes."""
        found = Counter(label for _, label in self.samples)
        return {name: found[label] for label, name in enumerate(self.classes)}
