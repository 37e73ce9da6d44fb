"""Out-of-distribution detection: scores, and how well they separate two populations.

Scores s(x) are higher for samples that look in-distribution (ID). With n ID and m OOD scores:

    AUROC     = P(s_id > s_ood) + 1/2 P(s_id = s_ood)                      orientation-free AUPR-in   = sum
    over distinct thresholds of (R_k - R_{k-1}) P_k        ID positive; AUPR-out: OOD positive, on -s FPR@TPR
    : among thresholds, the first whose TPR >= `tpr`; FPR is the share of the other population it lets through

The same scores give quite different FPR95 by which population is "positive" (CLIP papers: ID; OpenOOD,
pytorch-ood: OOD), so the orientation travels with the number. `mcm` and `max_cosine` take cosines; `msp`,
`energy` and `entropy` take logits. MCM_tau(cos) = MSP(cos / tau): MCM on logits already scaled by the model
is silently MSP, so anything beyond [-1, 1] is refused. `robustft.functional.concept_scores` computes all of
these from features and class embeddings without the matrix of cosines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_COSINE_TOLERANCE = 0.02  # half-precision unit vectors reach 1.01; scaled logits are an order of magnitude away


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


def ood_metrics(
    id_scores: Tensor | np.ndarray, ood_scores: Tensor | np.ndarray, tpr: float = 0.95, positive: str = "id"
) -> OODMetrics:
    """Compares ID scores (n,) with OOD scores (m,), both higher = more in-distribution; float64, ties counted
    exactly.

    ValueError for an empty population or NaN. O((n + m) log(n + m)). Sources: MCM (arXiv 2211.13445) and
    OpenOOD for the measures; MCM's code takes the point of
    nearest TPR, OpenOOD's the first that reaches it, as here.
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


def mcm(cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum concept matching, max_c softmax(cos / tau): cosines (..., K) to scores (...,), float32 at
    least.

    For K = 1000 and tau = 1 it lives near 0.0011, where bfloat16 has two dozen values. Source: MCM, arXiv
    2211.13445.
    """
    return msp(_cosines(cosines) / _positive(temperature))


def max_cosine(cosines: Tensor) -> Tensor:
    """The largest cosine, max_c cos: cosines (..., K) to scores (...,), float32 at least."""
    return _cosines(cosines).amax(-1)


def msp(logits: Tensor) -> Tensor:
    """Maximum softmax probability of logits (..., K), the model's own scale included; float32 at least.

    Source: Hendrycks & Gimpel 2017.
    """
    z = _logits(logits)
    return torch.exp(z.amax(-1) - z.logsumexp(-1))


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative free energy T logsumexp(z / T) of logits (..., K), float32 at least. Source: Liu et al. 2020.

    On cosines with T = 1 this is all but the mean cosine over all classes, a weak score; T = 0.01 follows the
    maximum.
    """
    return _positive(temperature) * (_logits(logits) / temperature).logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """*Negative* entropy of softmax(z / T) in nats, so that higher means more in-distribution; float32 at
    least."""
    p = (_logits(logits) / _positive(temperature)).softmax(-1)
    return -torch.special.entr(p).sum(-1)


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Sum over distinct positive scores t of P(score = t | positive) * precision(t); the step-wise area, not
    the trapezoid."""
    values, counts = np.unique(positives, return_counts=True)
    true = np.cumsum(counts[::-1])[::-1]  # positives at or above each value
    false = len(negatives) - np.searchsorted(np.sort(negatives), values, side="left")
    return float((counts * (true / (true + false))).sum() / len(positives))


def _population(scores: Tensor | np.ndarray, name: str) -> np.ndarray:
    scores = torch.as_tensor(scores).detach().double().cpu().numpy()
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} must be a non-empty one-dimensional array of scores, got shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} must not hold NaN, but {int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    return scores


def _logits(logits: Tensor) -> Tensor:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits and cosines must have shape (..., K) with K >= 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits and cosines must be floating point, got {logits.dtype}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _cosines(cosines: Tensor) -> Tensor:
    cosines = _logits(cosines)
    largest = float(cosines.detach().abs().max()) if cosines.numel() else 0.0
    if not largest <= 1.0 + _COSINE_TOLERANCE:
        raise ValueError(
            f"cosines must lie in [-1, 1], got |cos| up to {largest:.4g}; these look like scaled logits: "
            "pass cosines of unit features and unit class embeddings, before logit_scale"
        )
    return cosines


def _positive(temperature: float) -> float:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return temperature
