"""Out-of-distribution detection: how well scores separate two populations.

Scores s(x), such as those of `robustft.detection.scores`, are higher for samples that look in-distribution (ID). With n
ID and m OOD scores:

    AUROC      P(s_id > s_ood) + 1/2 P(s_id = s_ood)                                orientation-free
    AUPR-in    sum over distinct thresholds of (R_k - R_{k-1}) P_k                  ID positive
    AUPR-out   the same with OOD positive, on -s
    FPR@TPR    among thresholds, the first whose TPR >= `tpr`; FPR is the share of the other population let through

Over several OOD sets these are means over the sets. Full-spectrum: the ID scores are those of the ID set and of its
shifts together, so that a score which flags a shifted image of a known class loses by it.

The same scores give quite different FPR95 by which population is "positive" (CLIP papers: ID; OpenOOD, pytorch-ood:
OOD), so the orientation travels with the number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import numpy as np
from torch import Tensor

from robustft.ops import arguments


class OODMetrics(NamedTuple):
    """Separation of ID from OOD scores: fractions in [0, 1], and the threshold on the scores.

    `tpr` is what `threshold` reaches, at least what was asked. With `positive="id"` a sample is accepted as
    ID at scores >= threshold and `fpr` is the share of OOD accepted; with "ood" it is flagged at scores <=
    threshold, `fpr` the share of ID flagged.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr: float
    threshold: float
    tpr: float
    positive: str


@arguments.checked
def ood_metrics(
    id_scores: Tensor | np.ndarray, ood_scores: Tensor | np.ndarray, tpr: float = 0.95, positive: str = "id"
) -> OODMetrics:
    """Compares ID scores (n,) with OOD scores (m,), both higher = more in-distribution; float64, ties counted
    exactly.

    ValueError for an empty population or NaN. O((n + m) log(n + m)). Sources: MCM (arXiv 2211.13445) and OpenOOD for
    the measures; MCM's code takes the point of nearest TPR, OpenOOD's the first that reaches it, as here.
    """
    if positive not in ("id", "ood"):
        raise ValueError(f"positive must be 'id' or 'ood', got {positive!r}")
    inside, outside = _population(id_scores, "id_scores"), _population(ood_scores, "ood_scores")

    ordered = np.sort(inside)
    below, up_to = (np.searchsorted(ordered, outside, side=side) for side in ("left", "right"))
    doubled_wins = int((2 * len(inside) - below - up_to).sum())  # integers: 2 for each id > ood, 1 for each tie

    sign, positives, negatives = (1.0, inside, outside) if positive == "id" else (-1.0, outside, inside)
    limit = sign * threshold(sign * positives, tpr)
    return OODMetrics(
        auroc=doubled_wins / (2 * len(inside) * len(outside)),
        aupr_in=_average_precision(inside, outside),
        aupr_out=_average_precision(-outside, -inside),
        fpr=float(np.mean(sign * negatives >= sign * limit)),
        threshold=limit,
        tpr=float(np.mean(sign * positives >= sign * limit)),
        positive=positive,
    )


class Separation(NamedTuple):
    """AUROC and FPR, means over OOD sets, and the measures of each set by name."""

    auroc: float
    fpr: float
    sets: dict[str, OODMetrics]

    @classmethod
    def of(cls, sets: dict[str, OODMetrics]) -> Separation:
        """Out of the measures of each set, at least one."""
        return cls(fmean(m.auroc for m in sets.values()), fmean(m.fpr for m in sets.values()), sets)


class SpectrumMetrics(NamedTuple):
    """Separation of the ID set from near and from far OOD sets; then with shifted ID images counted as ID. None where
    there are no such sets, or no shifts."""

    near: Separation | None
    far: Separation | None
    full_near: Separation | None
    full_far: Separation | None


@arguments.checked
def spectrum_metrics(
    id_scores: Tensor | np.ndarray,
    *,
    near: Mapping[str, Tensor | np.ndarray] | None = None,
    far: Mapping[str, Tensor | np.ndarray] | None = None,
    shifts: Mapping[str, Tensor | np.ndarray] | None = None,
    tpr: float = 0.95,
    positive: str = "id",
) -> SpectrumMetrics:
    """Near-OOD, far-OOD and full-spectrum detection, from scores (n,) of the ID set and of sets by name.

    near, far: OOD sets, such as other kinds of bird, and textures. shifts: of the ID set's classes, which count as ID
    in full-spectrum detection: all images together, those of the ID set among them. Every score is by one model for one
    set of classes. tpr, positive: of `ood_metrics`; OpenOOD's FPR has positive="ood". ValueError for no OOD set.
    Source: OpenOOD v1.5 (Zhang et al. 2023, arXiv 2306.09301); full-spectrum: Yang et al. 2022 (arXiv 2204.05306).
    """
    known = _population(id_scores, "id_scores")
    if not near and not far:
        raise ValueError("near and far are empty: there must be at least one OOD set")

    def separation(inside: np.ndarray, kind: str, sets: Mapping[str, Tensor | np.ndarray] | None) -> Separation | None:
        found = {
            name: ood_metrics(inside, _population(scores, f"{kind}[{name!r}]"), tpr, positive)
            for name, scores in (sets or {}).items()
        }
        return Separation.of(found) if found else None

    more = [_population(scores, f"shifts[{name!r}]") for name, scores in (shifts or {}).items()]
    full = np.concatenate([known, *more])
    return SpectrumMetrics(
        separation(known, "near", near),
        separation(known, "far", far),
        separation(full, "near", near) if more else None,
        separation(full, "far", far) if more else None,
    )


@arguments.checked
def threshold(id_scores: Tensor | np.ndarray, tpr: float = 0.95) -> float:
    """The highest score t with mean(id_scores >= t) >= `tpr`: accept a new sample as in-distribution at
    scores >= t."""
    scores = _population(id_scores, "id_scores")
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr!r}")
    count = math.ceil(tpr * len(scores))
    if (count - 1) / len(scores) >= tpr:  # 0.07 * 100 is a little more than 7
        count -= 1
    return float(np.sort(scores)[len(scores) - count])


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Sum over distinct positive scores t of P(score = t | positive) * precision(t); the step-wise area, not
    the trapezoid."""
    values, counts = np.unique(positives, return_counts=True)
    true = np.cumsum(counts[::-1])[::-1]  # positives at or above each value
    false = len(negatives) - np.searchsorted(np.sort(negatives), values, side="left")
    return float((counts * (true / (true + false))).sum() / len(positives))


def _population(scores: Tensor | np.ndarray, name: str) -> np.ndarray:
    scores = arguments.array(name, scores)
    if scores.is_complex():
        raise TypeError(f"{name} must be real, got {scores.dtype}")
    scores = scores.detach().double().cpu().numpy()
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} must be a non-empty one-dimensional array of scores, got shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} must not hold NaN, but {int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    return scores
