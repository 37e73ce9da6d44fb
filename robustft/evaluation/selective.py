"""Selective prediction: what is gained by leaving the least certain images to somebody else.

N images in falling order of confidence, of which the first i are answered; E_i errors are among them:

    coverage i / N,   risk E_i / i,   generalised risk E_i / N
    AURC     (1/N) sum_i E_i / i                          mean risk over the coverages (Geifman and El-Yaniv 2017)
    E-AURC   AURC minus that of the best order of the same errors (Geifman et al. 2019, here without approximation)
    AUGRC    area under the generalised risk = (1 - AUROC) a (1 - a) + (1 - a)^2 / 2      (Traub et al. 2024)

with a the accuracy and AUROC that of the confidence for being right. Images of equal confidence are answered together
or not at all, so a curve has its points where a group of them ends. In a group E_i is taken as in the mean over all
orders of it: between the ends it rises linearly. So no measure depends on the order in which images come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.ops import arguments


class Operating(NamedTuple):
    """A place to work at: images of at least this confidence are answered, a share `coverage` of all, of which a share
    `risk` is wrong. Where none is answered, the threshold is infinite and the risk 0."""

    threshold: float
    coverage: float
    risk: float


@dataclass(frozen=True)
class SelectiveRisk:
    """Risk over coverage of `count` images with a share `error` of errors.

    The curve's points are in rising order of coverage, the last at 1 with the risk `error`; `threshold` is the least
    confidence that is answered there.
    """

    count: int
    error: float
    aurc: float
    e_aurc: float
    augrc: float
    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    threshold: tuple[float, ...]

    @arguments.checked
    def at_risk(self, bound: float) -> Operating:
        """The largest coverage whose risk is at most `bound`: on these images, which is no promise for others."""
        fit = [i for i, risk in enumerate(self.risk) if risk <= bound]
        return Operating(self.threshold[fit[-1]], self.coverage[fit[-1]], self.risk[fit[-1]]) if fit else NOTHING

    @arguments.checked
    def thinned(self, points: int = 100) -> SelectiveRisk:
        """The same measures with a curve of at most so many of its points, evenly over coverage, and the last."""
        if points < 1:
            raise ValueError(f"points must be at least 1, got {points}")
        if len(self.coverage) <= points:
            return self
        wanted = np.searchsorted(self.coverage, np.arange(1, points + 1) / points - 1e-12)
        kept = sorted({min(int(i), len(self.coverage) - 1) for i in wanted})
        curve = {name: tuple(getattr(self, name)[i] for i in kept) for name in ("coverage", "risk", "threshold")}
        return SelectiveRisk(self.count, self.error, self.aurc, self.e_aurc, self.augrc, **curve)


NOTHING = Operating(math.inf, 0.0, 0.0)


@arguments.checked
def selective_risk(confidence: Tensor | np.ndarray, correct: Tensor | np.ndarray) -> SelectiveRisk:
    """How the risk falls where the images of low confidence are not answered.

    confidence: (N,) numbers, higher where the prediction is surer; any increasing function of it gives the same.
    correct: (N,) bool, whether the prediction is right. float64; O(N log N). ValueError for no images, other shapes
    and NaN; TypeError where `correct` is not bool.
    """
    confidence, correct = (
        arguments.array(name, value).detach().cpu()
        for name, value in (("confidence", confidence), ("correct", correct))
    )
    if confidence.ndim != 1 or not len(confidence) or correct.shape != confidence.shape:
        raise ValueError(
            f"confidence and correct must be (N,), one of each for N >= 1 images, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    if correct.dtype != torch.bool:
        raise TypeError(f"correct must be bool, got {correct.dtype}")
    if bool(confidence.isnan().any()):
        raise ValueError(f"confidence holds {int(confidence.isnan().sum())} NaN of {len(confidence)}")
    c, wrong = confidence.double().numpy(), ~correct.numpy()
    n = len(c)
    values, group = np.unique(-c, return_inverse=True)
    ends = np.cumsum(np.bincount(group))
    errors = np.cumsum(np.bincount(group, wrong))
    answered = np.arange(1, n + 1)
    expected = np.interp(answered, np.r_[0, ends], np.r_[0.0, errors])
    best = np.maximum(answered - (n - errors[-1]), 0.0)
    aurc, least = (float((e / answered).mean()) for e in (expected, best))
    return SelectiveRisk(
        count=n,
        error=float(errors[-1] / n),
        aurc=aurc,
        e_aurc=max(aurc - least, 0.0),
        augrc=float((expected.sum() - expected[-1] / 2) / n**2),
        coverage=tuple((ends / n).tolist()),
        risk=tuple((errors / ends).tolist()),
        threshold=tuple((-values).tolist()),
    )
