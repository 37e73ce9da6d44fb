"""What torch's wrappers of data sets hold: `Subset` (of `random_split` too) and `ConcatDataset`, in any nesting.

A wrapper forwards items and nothing else. What a data set tells beside them (its groups, whether damaged images are
skipped) is asked of the parts that read the images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Subset


def parts_of(data: Any) -> tuple[Any, ...]:
    """The data sets directly inside a wrapper; () of anything else."""
    if isinstance(data, Subset):
        return (data.dataset,)
    return tuple(data.datasets) if isinstance(data, ConcatDataset) else ()


def owners(data: Any, name: str) -> Iterator[Any]:
    """The outermost of a data set and of those inside it that have the attribute; what has none inside is given too."""
    inside = () if hasattr(data, name) else parts_of(data)
    if not inside:
        yield data
    for part in inside:
        yield from owners(part, name)


def told(data: Any, name: str, otherwise: Any = None) -> Any:
    """An attribute of the data set, or of those inside it where they agree; `otherwise` where they do not."""
    values = [getattr(owner, name, otherwise) for owner in owners(data, name)]
    return values[0] if values and all(value == values[0] for value in values) else otherwise


def skips(data: Any) -> bool:
    """Whether damaged images of the data set, or of one inside it, are to be skipped."""
    return any(getattr(owner, "on_error", "raise") == "skip" for owner in owners(data, "on_error"))


def skips_row(data: Any, row: int) -> bool:
    """Whether the data set that reads the image of this row wants it skipped where it cannot be read."""
    if not hasattr(data, "on_error"):
        if isinstance(data, Subset):
            return skips_row(data.dataset, int(data.indices[row]))
        if isinstance(data, ConcatDataset):
            place = bisect_right(data.cumulative_sizes, row)
            before = data.cumulative_sizes[place - 1] if place else 0
            return skips_row(data.datasets[place], row - before)
    return getattr(data, "on_error", "raise") == "skip"


def groups_of(data: Any) -> Any:
    """`.groups` of a data set, and of those inside wrappers; None where there are none, or not of the same names."""
    groups = getattr(data, "groups", None)
    if groups is not None or not parts_of(data):
        return groups
    inside = [groups_of(part) for part in parts_of(data)]
    if any(groups is None for groups in inside):
        return None
    if isinstance(data, Subset):
        return [inside[0][int(index)] for index in data.indices]
    names = {group_names_of(part) for part in data.datasets}
    return [group for groups in inside for group in groups] if len(names) == 1 else None


def group_names_of(data: Any) -> tuple[str, ...]:
    """The names of `groups_of`; () where there are none."""
    return tuple(told(data, "group_names", ()))
