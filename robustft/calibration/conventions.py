"""How papers on CLIP measure calibration: to compare with their numbers, and for nothing else.

    name        bins  what differs from `calibration_report`'s defaults, and what that distorts
    carot         10  ECE and its kin averaged over consecutive batches of 512: in a batch a bin holds few samples, so
                      a perfectly calibrated model scores about 3.1 % (0.4 % on the whole set), and the order of the
                      data matters (theirs is sorted by class)
    dac           10  bins [a, b); confidences of exactly 1 weigh in the last bin's mass, but are missing from its
                      accuracy and confidence, which can halve the ECE of a sure model; the MCE is the largest *mass
                      times* gap, so never above the ECE; ACE has quantile bins. Also CMP's, which builds on its code
    clipcalib     10  nothing else: fewer bins hide more
    c-tpt         20  nothing else: more bins, more noise

Sources, read in their released code: CaRot (MLAI-Yonsei), DAC (ml-stat-Sustech/CLIP_Calibration, tools/metrics.py),
CLIPCalib (Bala93), C-TPT (hee-suk-yoon). OpenOOD's ECE takes the largest raw logit for the confidence: it measures
nothing, and is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Measures(NamedTuple):
    """Those that a convention computes in its own way."""

    ece: float
    mce: float
    ace: float


def dac(confidence: np.ndarray, correct: np.ndarray, bins: int) -> Measures:
    """DAC's ECE, MCE and ACE of confidences and correctness (N,)."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    cell = np.digitize(confidence, edges) - 1  # a confidence of 1 gets the cell `bins`, which nobody reads
    mass = np.histogram(confidence, edges)[0] / len(confidence)  # its last bin is closed: 1 counts
    counts = np.maximum(np.bincount(cell, minlength=bins + 1), 1)
    gaps = np.bincount(cell, correct - confidence, bins + 1) / counts
    inner = np.digitize(confidence, edges[1:-1])
    quantiles = np.unique(np.percentile(confidence, 100.0 * edges))
    return Measures(
        ece=float(mass @ np.abs(gaps[:bins])),
        mce=_mass_times_gap(inner, confidence, correct).max(),
        ace=_mass_times_gap(np.digitize(confidence, quantiles[1:-1]), confidence, correct).sum(),
    )


def _mass_times_gap(cell: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    return np.abs(np.bincount(cell, correct - confidence)) / len(confidence)


class Convention(NamedTuple):
    bins: int
    protocol: str = "full"
    measures: Callable[[np.ndarray, np.ndarray, int], Measures] | None = None


CONVENTIONS = {
    "carot": Convention(10, "per_batch"),
    "dac": Convention(10, measures=dac),
    "clipcalib": Convention(10),
    "c-tpt": Convention(20),
}
