"""Few-shot data: balanced subsets, and the splits that the prompt learners' papers share.

    few_shot(data, 4, seed=1)          4 images of each class, a function of (labels, shots, seed)
    read_split("split_zhou_....json")  {"train": [[path, label, class name], ...], "val": ..., "test": ...}

The subset of 4 shots holds that of 2 of the same seed: curves over shots differ by what was added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.data.paths import PathDataset
from robustft.files import read_json
from robustft.ops.kinds import checked, dense, described

PARTS = ("train", "val", "test")


@checked
def few_shot(data: Any, shots: int, *, seed: int = 0, at_most: bool = False) -> Any:
    """`shots` random samples of each class of `data`, in its order and of its kind.

    data: (images, labels) tensors, a data set with `.subset(indices)` (`ImageDataset`, `PathDataset`), or any
    map-style one that tells its labels in `.labels` or `.targets`, which becomes a `torch.utils.data.Subset`.

    at_most: take all samples of a class that has fewer, as CoOp's code silently does.

    Raises ValueError for a class with fewer samples than `shots` unless `at_most`, a class without any, and shots below
    1; TypeError for data that do not tell their labels.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    labels = data[1] if pair else getattr(data, "labels", getattr(data, "targets", None))
    if labels is None:
        raise TypeError(
            f"data must be (images, labels) or tell its labels in .labels or .targets, got {type(data).__name__}"
        )
    if pair and (dense("data's images", data[0]).ndim == 0 or len(data[0]) != labels.numel()):
        raise ValueError(f"data must be as many images as labels, got {described(data[0])} and {described(labels)}")
    rows = few_shot_indices(labels, shots, seed=seed, classes=getattr(data, "classes", None), at_most=at_most)
    if pair:
        return tuple(part[rows.to(part.device)] for part in data)
    if callable(getattr(data, "subset", None)):
        return data.subset(rows)
    return torch.utils.data.Subset(data, rows.tolist())


@checked
def few_shot_indices(
    labels: Tensor | Sequence[int],
    shots: int,
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    at_most: bool = False,
) -> Tensor:
    """Sorted indices (K shots,) of `few_shot`'s samples, of labels (N,); `classes` are for its errors."""
    if isinstance(labels, Tensor) and labels.is_meta:
        raise ValueError("labels is a meta tensor, which holds no numbers; expected integers (N,)")
    if not 0 <= seed:
        raise ValueError(f"seed must not be negative, got {seed}")
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or not len(values):
        raise ValueError(f"labels must be integers (N,), not empty, got {values.dtype} of shape {values.shape}")
    chosen = []
    for label in range(max(int(values.max()) + 1, 0 if classes is None else len(classes))):
        found = np.flatnonzero(values == label)
        if len(found) < (1 if at_most else shots):
            name = f"{label} ({classes[label]!r})" if classes is not None and label < len(classes) else str(label)
            raise ValueError(f"shots: class {name} has {len(found)} samples, fewer than the {shots} asked for")
        # A generator of each class: what is drawn for one does not depend on how many others there are.
        chosen.append(found[np.random.default_rng((seed, label)).permutation(len(found))[:shots]])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


class Split(NamedTuple):
    """The three parts of one file, of the same classes in the same order."""

    train: PathDataset
    val: PathDataset
    test: PathDataset


@checked
def read_split(path: str | Path, root: str | Path, transform: Callable[[Any], Any] | None = None) -> Split:
    """The data sets of a CoOp split file (split_zhou_Caltech101.json and the like); images lie below `root`.

    Class names are in the order of the labels. Whether the images exist shows when they are read. Raises ValueError,
    saying where, for a file that is no such split, a label that no sample has, a label with two names and a name with
    two labels.
    """
    path = Path(path)
    parts = read_json(path, f"an object with the lists {', '.join(PARTS)}")
    if not isinstance(parts, dict) or not {"train", "test"} <= parts.keys() <= set(PARTS):
        found = sorted(parts) if isinstance(parts, dict) else type(parts).__name__
        raise ValueError(f"{path}: expected an object with the lists {', '.join(PARTS)}, got {found}")
    if wrong := [part for part in parts if not isinstance(parts[part], list)]:
        raise ValueError(f"{path}: {wrong[0]} is {parts[wrong[0]]!r:.80}; expected a list")
    rows = {part: [_row(path, part, i, row) for i, row in enumerate(parts.get(part, []))] for part in PARTS}
    classes = _class_names(path, [row for part in PARTS for row in rows[part]])
    return Split(
        *(
            PathDataset(tuple((Path(root, file), label) for file, label, _ in rows[part]), classes, transform)
            for part in PARTS
        )
    )


def _row(path: Path, part: str, index: int, row: Any) -> tuple[str, int, str]:
    match row:
        case [str(file), int(label), str(name)] if not isinstance(label, bool) and label >= 0 and name.strip():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"{path}: {part}[{index}] has the path {file!r}, which does not lie below root")
            return file, label, name
    raise ValueError(f"{path}: {part}[{index}] is {row!r:.80}; expected [path, label, class name]")


def _class_names(path: Path, rows: Sequence[tuple[str, int, str]]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for file, label, name in rows:
        if names.setdefault(label, name) != name:
            raise ValueError(f"{path}: label {label} is {names[label]!r} and, for {file!r}, {name!r}")
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{path}: class {name!r} has label {labels[name]} and, for {file!r}, {label}")
    missing = max(names, default=0) + 1 - len(names)
    if missing:  # the first of them is no further than the number of names, however large a label is
        first = next(label for label in range(len(names) + 1) if label not in names)
        raise ValueError(f"{path}: no sample has label {first} ({missing} of {missing + len(names)})")
    return tuple(names[label] for label in range(len(names)))
