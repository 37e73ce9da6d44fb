"""Measures of the worst rather than the average, as WILDS (arXiv 2012.07421) reports them.

F1_c     = 2 TP_c / (2 TP_c + FP_c + FN_c);   macro F1 = its mean over the classes that have samples    iWildCam
acc_g    = share of group g's samples predicted right;   the lowest over groups that have samples       FMoW
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops.arguments import INTEGERS, check_count
from robustft.ops.kinds import checked, described


class GroupAccuracy(NamedTuple):
    """Accuracy of each group (G,) float64, 0 for an empty one; the groups' sizes (G,); and the lowest accuracy."""

    accuracy: Tensor
    counts: Tensor
    worst: float


@checked
def macro_f1(predictions: Tensor, labels: Tensor) -> float:
    """Mean F1 over the classes that occur in `labels`, as WILDS' iWildCam: every species counts the same.

    A class without samples is left out, also where it is predicted: that is a miss of the true class and nothing
    more. A class that is never predicted right has F1 0. Equals scikit-learn's
    f1_score(labels, predictions, average="macro", labels=unique(labels)).

    Args:
        predictions: (N,) class indices, or (N, K) logits or probabilities, of which the largest counts.
        labels: (N,) class indices.

    Raises ValueError for no samples, other shapes or negative indices.
    """
    predictions, labels = _classes(predictions, labels)
    size = int(max(predictions.max(), labels.max())) + 1
    true, predicted, right = (
        torch.bincount(of, minlength=size).double() for of in (labels, predictions, labels[predictions == labels])
    )
    present = true > 0
    return float((2 * right / (true + predicted))[present].mean())


@checked
def group_accuracy(
    predictions: Tensor,
    labels: Tensor,
    groups: Tensor,
    *,
    num_groups: int | None = None,
    ignored: Sequence[int] = (),
) -> GroupAccuracy:
    """Accuracy of every group of samples, and the worst.

    As in WILDS, an empty group has accuracy 0 in the table and is never the worst.

    Args:
        predictions, labels: as in `macro_f1`.
        groups: (N,) integers in [0, num_groups), such as regions or (class, background) pairs as one number.
        num_groups: G; by default the highest group's number plus 1.
        ignored: groups that cannot be the worst; WILDS' FMoW leaves the region "Other" out.

    Raises ValueError as `macro_f1`, for groups out of range, and where no group is left to be the worst.
    """
    predictions, labels = _classes(predictions, labels)
    groups = _indices("groups", groups, len(labels)).to(labels.device)
    size = int(groups.max()) + 1 if num_groups is None else num_groups
    check_count("num_groups", size)
    if int(groups.max()) >= size:
        raise ValueError(f"groups must lie in [0, {size}), got {int(groups.max())}")
    if outside := [group for group in ignored if not 0 <= group < size]:
        raise ValueError(f"ignored must hold groups in [0, {size}), got {outside}")
    counts = torch.bincount(groups, minlength=size)
    right = torch.bincount(groups[predictions == labels], minlength=size)
    accuracy = right.double() / counts.clamp(min=1)
    eligible = counts > 0
    eligible[list(ignored)] = False
    if not eligible.any():
        raise ValueError("every group is empty or ignored: there is no worst one")
    return GroupAccuracy(accuracy, counts, float(accuracy[eligible].min()))


@checked
def worst_group_accuracy(predictions: Tensor, labels: Tensor, groups: Tensor, *, ignored: Sequence[int] = ()) -> float:
    """`group_accuracy(...).worst`: the accuracy of the worst group that has samples."""
    return group_accuracy(predictions, labels, groups, ignored=ignored).worst


def _classes(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.is_meta or values.is_complex() or values.ndim == 0 or values.numel() == 0:
            raise ValueError(f"{name} is {described(values)} on {values.device}; expected numbers (N,)")
    if predictions.ndim == 2:
        if predictions.isnan().any():
            raise ValueError(f"predictions (N, K) hold {int(predictions.isnan().any(1).sum())} rows with NaN")
        predictions = predictions.argmax(1)
    labels = _indices("labels", labels, len(predictions))
    return _indices("predictions", predictions, len(labels)).to(labels.device), labels


def _indices(name: str, values: Tensor, count: int) -> Tensor:
    if values.dtype not in INTEGERS or values.is_meta or values.shape != (count,) or count == 0:
        raise ValueError(
            f"{name} must be integers (N,), one for each of N >= 1 samples, got {values.dtype} of shape "
            f"{tuple(values.shape)} for {count} samples"
        )
    values = values.long()  # before anything else: unsigned ones have no minimum
    if int(values.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {int(values.min())}")
    return values
