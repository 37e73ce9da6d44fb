"""The class names that a data set tells, beside those of a predictor or a method: which label means which class.

    names    of the data set; its label y means names[y]
    classes  of the predictor or method; its column c means classes[c]

    names equal classes               labels stay
    the same names, another order     y -> classes.index(names[y])
    some of the classes               the same; a predictor is restricted to them, before its softmax
    other names of the same classes   read as the names that they stand for (`ClassNames.also`)
    the numbers 0, 1, ... in order    no names at all: labels stay, where there are as many classes
    anything else                     ValueError that names the classes

Labels alone cannot tell two orders apart: under the wrong one every number is plausible and wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHOWN = 5  # class names in a message


class ClassNames(tuple[str, ...]):
    """Class names, a tuple of them, with further names by which data sets may call the same classes.

    Of `class_names={"n01440764": "tench"}` the folders are the names and the words are `also`, or the other way round
    where a data set is renamed. Each row of `also` names every class, in the same order. Equality is the names' alone.
    """

    also: tuple[tuple[str, ...], ...]

    def __new__(cls, names: Iterable[str], also: Iterable[Sequence[str]] = ()) -> ClassNames:
        found = super().__new__(cls, names)
        given = getattr(names, "also", ()), also
        rows = dict.fromkeys(tuple(row) for part in given for row in part)
        if short := [row for row in rows if len(row) != len(found)]:
            raise ValueError(f"also names {len(short[0])} classes; expected {len(found)}, one name for each class")
        found.also = tuple(row for row in rows if row != tuple(found))
        return found

    @classmethod
    def of(cls, names: Iterable[str] | Mapping[str, str]) -> ClassNames:
        """Names as they are, or the keys of {name: another name of the same class}."""
        return cls(names, [tuple(names.values())]) if isinstance(names, Mapping) else cls(names)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The names, then the other names."""
        return tuple(self), *self.also

    def at(self, places: Sequence[int]) -> ClassNames:
        """The classes at these places, in that order, with their other names."""
        return ClassNames((self[i] for i in places), [[row[i] for i in places] for row in self.also])

    def renamed(self, names: Iterable[str]) -> ClassNames:
        """The same classes under other names, which they have beside those that they had."""
        return ClassNames(names, self.rows)


class Matching(NamedTuple):
    """Where the names of a data set stand among the classes: `classes_of_labels[y]` is the class of label y.

    `changes` says whether any label changes; `partial` whether some classes are missing from the data set.
    """

    classes_of_labels: tuple[int, ...]
    classes: int

    @property
    def partial(self) -> bool:
        return len(self.classes_of_labels) < self.classes

    @property
    def changes(self) -> bool:
        return self.classes_of_labels != tuple(range(len(self.classes_of_labels)))

    @property
    def kept(self) -> tuple[int, ...]:
        """The classes that the data set names, in their own order."""
        return tuple(sorted(self.classes_of_labels))

    def among_kept(self, labels: Tensor) -> Tensor:
        """Labels (N,) of the data set as places (N,) in `kept`; errors as of `of`."""
        return torch.searchsorted(torch.tensor(self.kept, device=labels.device), self.of(labels))

    def of(self, labels: Tensor) -> Tensor:
        """Labels (N,) of the data set as classes (N,), int64, on their device.

        ValueError for a label that the data set has no name for.
        """
        if not len(labels):
            return labels.long()
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= len(self.classes_of_labels):
            raise ValueError(
                f"labels hold {low}..{high}, but the data set names {len(self.classes_of_labels)} classes: expected "
                f"values in [0, {len(self.classes_of_labels)})"
            )
        return torch.tensor(self.classes_of_labels, device=labels.device)[labels.long()]


def class_names(dataset: Any) -> ClassNames | None:
    """The class names that a data set tells, in the order of its labels; None where it tells none.

    Read are `.classes` (torchvision's, robustft's), the names of a `ClassLabel` column (Hugging Face), the data set
    inside a `Subset`, and those of a `ConcatDataset`, whose parts must agree.
    """
    names = getattr(dataset, "classes", None)
    if names is None and (features := getattr(dataset, "features", None)) is not None:
        column = features.get("label") if isinstance(features, Mapping) else None
        names = getattr(column, "names", None)
    if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names):
        return ClassNames(names) or None
    if isinstance(dataset, torch.utils.data.Subset):
        return class_names(dataset.dataset)
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [class_names(part) for part in dataset.datasets]
        if len(set(parts)) > 1:
            told = " and ".join(few(part) if part else "no names" for part in dict.fromkeys(parts))
            raise ValueError(f"the parts of a ConcatDataset number their classes differently: {told}")
        return parts[0] if parts else None
    return None


def matching_of(dataset: Any, classes: Sequence[str], *, of: str = "the model") -> Matching | None:
    """`match_classes` of the names that a data set tells; None where it tells none."""
    names = class_names(dataset)
    return None if names is None else match_classes(names, classes, of=of)


def match_classes(names: Sequence[str], classes: Sequence[str], *, of: str = "the model") -> Matching:
    """How the labels of a data set with `names` read as `classes`, of a predictor or a method (`of`).

    ValueError, naming classes, for names that are not among the classes, and where a repeated name leaves open which
    class is meant. A change is said once, as a warning.
    """
    pairs = [(told, known) for told in ClassNames(names).rows for known in ClassNames(classes).rows]
    names, classes = next((pair for pair in pairs if set(pair[0]) <= set(pair[1])), pairs[0])
    numbers = len(names) == len(classes) and names == tuple(map(str, range(len(names))))
    if names == classes or numbers and not any(set(told) & set(known) for told, known in pairs):
        return Matching(tuple(range(len(classes))), len(classes))
    if unknown := [name for name in names if name not in set(classes)]:
        known = set(names)
        missing = [name for name in classes if name not in known]
        raise ValueError(
            f"the data set's classes are not those of {of}: {few(unknown)} of the data set's {len(names)} "
            f"{'is' if len(unknown) == 1 else 'are'} unknown to {of}, which has {len(classes)}"
            + (f", among them {few(missing)}" if missing else "")
            + ". Give the names that the data set has, or class_names={name in the data set: name in captions}"
        )
    for what, row in (("data set", names), (of, classes)):
        if repeated := sorted({name for name in row if row.count(name) > 1}):
            raise ValueError(
                f"{few(repeated)} names several classes of {what}, and the orders of the data set and of {of} differ: "
                "which of them a label means cannot be told. Give each class a name of its own, or the same order"
            )
    place = {name: i for i, name in enumerate(classes)}
    matching = Matching(tuple(place[name] for name in names), len(classes))
    _say(names, classes, of)
    return matching


@cache  # once for each pair
def _say(names: tuple[str, ...], classes: tuple[str, ...], of: str) -> None:
    if len(names) < len(classes):
        missing = [name for name in classes if name not in set(names)]
        what = f"has {len(names)} of the {len(classes)} classes of {of} (not {few(missing)}): only these take part"
    else:
        what = f"has the classes of {of} in another order ({few(names)} for {few(classes)}): labels are matched by name"
    warnings.warn(f"the data set {what}", UserWarning, stacklevel=4)


def few(names: Sequence[str]) -> str:
    """Some names for a message, and how many more there are."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
