"""How far confidence is from accuracy: temperature, the ECE family and its noise floor.

With probabilities p (N, K), labels y, confidence c_i = max_k p_ik, correctness a_i = [argmax_k p_ik = y_i]:

    ECE     sum_b (n_b / N) |mean_b a - mean_b c|      b runs over right-closed bins of c; c = 1 is in the last
    MCE     max_b |mean_b a - mean_b c|                over the bins that hold a sample
    ACE     ECE over bins of equal mass                samples of equal confidence share a bin
    Brier   mean_i sum_k (p_ik - [k = y_i])^2          0 .. 2
    NLL     mean_i -log p_iy

The noise floor is E[ECE] of a model with the very same confidences that is perfectly calibrated, a_i ~
Bernoulli(c_i). An ECE near its floor says nothing but that N is small. It is computed, not simulated: in each
bin, sum_i a_i is Poisson-binomial and its mean absolute deviation follows from its characteristic function
(`_mean_absolute_deviation`).

Temperature T divides the logits. NLL is convex in beta = 1/T with d NLL / d beta = mean_i (E_{p_i}[z_i] -
z_iy), and the mean confidence rises with beta, so both rules below are the root of one monotone function of
log beta.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.calibration.conventions import CONVENTIONS
from robustft.ops import arguments

TEMPERATURES = (1e-3, 1e3)
"""Every fitted temperature lies in this range; a fit whose optimum is outside returns the nearer end and
warns."""

CONFIDENCE_TOLERANCE = 1e-3
"""`temperature_matching_confidence` brings mean confidence this close to accuracy wherever the range allows
it."""

MOST_BINS = 2**16  # of a histogram of every class
_ROWS = 8192  # rows of logits or probabilities held in float64 at a time


class Bin(NamedTuple):
    """One row of the reliability table: the samples with `lower` < confidence <= `upper`."""

    lower: float
    upper: float
    count: int  # type: ignore[assignment]  # rather than tuple.count
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration of one model on one labelled set; every value but `bins` and `count` is a fraction or in
    nats.

    `ece`, `mce` (unweighted maximum), `mass_weighted_mce` (max_b n_b / N * gap, as in DAC and CMP tables) and
    `bins` follow `scheme`; `ace` always has equal-mass bins, `classwise_ece` always equal-width bins,
    averaged over one-vs-rest problems. `noise_floor` belongs to `ece`. `bins` lists the bins that hold a
    sample.
    """

    count: int
    accuracy: float
    confidence: float
    ece: float
    noise_floor: float
    mce: float
    mass_weighted_mce: float
    ace: float
    classwise_ece: float
    brier: float
    nll: float
    bins: tuple[Bin, ...]
    scheme: str = "width"
    protocol: str = "full"


@arguments.checked
def calibration_report(
    probabilities: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    bins: int = 15,
    scheme: str = "width",
    protocol: str = "full",
    batch_size: int = 512,
    convention: str | None = None,
) -> CalibrationReport:
    """Measures how well `probabilities` (N, K) predict `labels` (N,) and themselves.

    `scheme` is "width" (bins (k/B, (k+1)/B], the first closed at 0) or "mass" (equal counts; tied confidences
    share a bin). `protocol="full"` looks at the whole set once. `protocol="per_batch"` averages ECE, MCE,
    ACE, classwise ECE and noise floor over consecutive batches of `batch_size`, weighted by size: CaRot's
    released evaluation (with 10 bins). A perfectly calibrated model scores several times its true ECE that
    way, so it serves for comparison with published numbers only. `convention` is the name of a paper in
    `calibration.conventions`, which says what it distorts: "carot", "dac" (CMP's too), "clipcalib" or "c-tpt"; it
    fixes the four before it, and the report's `protocol` is its name. A zero probability of the true class counts
    as the smallest normal float32 (87.3 nats), which keeps the NLL finite.

    Rows must be distributions: ValueError for negative values, NaN or sums other than 1, as logits and
    cosines have. Memory: O(N) plus a float64 copy of 8192 rows. Sources: Naeini et al. 2015; Guo et al. 2017
    (ECE, MCE); Nguyen & O'Connor 2015 (equal mass); Kull et al. 2019 (classwise).
    """
    published = None
    if convention is not None:
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {sorted(CONVENTIONS)}, got {convention!r}")
        if (bins, scheme, protocol, batch_size) != (15, "width", "full", 512):
            raise ValueError(f"convention {convention!r} fixes bins, scheme, protocol and batch_size: leave them out")
        published = CONVENTIONS[convention]
        bins, protocol = published.bins, published.protocol
    if scheme not in ("width", "mass"):
        raise ValueError(f"scheme must be 'width' or 'mass', got {scheme!r}")
    if protocol not in ("full", "per_batch"):
        raise ValueError(f"protocol must be 'full' or 'per_batch', got {protocol!r}")
    for name, value in (("bins", bins), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    arguments.check_count("bins", bins, MOST_BINS)
    p, y = check_labelled(probabilities, labels, "probabilities")

    # One pass over the rows: top-label confidence and correctness, proper scores, one-vs-rest sums per class
    # and bin.
    count, classes = p.shape
    confidence, correct = np.empty(count), np.empty(count)
    brier = nll = 0.0
    gaps = np.zeros(classes * bins)
    for start in range(0, count, _ROWS):
        q, t = distributions(p[start : start + _ROWS], start), y[start : start + _ROWS].numpy()
        rows = np.arange(len(q))
        top = q.argmax(1)
        confidence[start : start + len(q)], correct[start : start + len(q)] = q[rows, top], top == t
        nll -= np.log(np.maximum(q[rows, t], np.finfo(np.float32).tiny)).sum()
        cell = _width_bins(q, bins) + bins * np.arange(classes)
        q[rows, t] -= 1.0
        brier += (q * q).sum()
        gaps += np.bincount(cell.ravel(), q.ravel(), classes * bins)

    table = _table(confidence, correct, _assign(confidence, bins, scheme), scheme, bins)
    accuracy = float(correct.mean())
    ace_table = _table(confidence, correct, _assign(confidence, bins, "mass"), "mass", bins)
    ece, ace = _ece(table), _ece(ace_table)
    mce = max(abs(b.accuracy - b.confidence) for b in table)
    mass_weighted = max(b.count * abs(b.accuracy - b.confidence) for b in table) / count
    classwise, floor = float(np.abs(gaps).sum() / (count * classes)), _noise_floor(confidence, bins, scheme)
    if protocol == "per_batch":
        parts = [
            calibration_report(p[i : i + batch_size], y[i : i + batch_size], bins, scheme)
            for i in range(0, count, batch_size)
        ]
        measures = [(r.ece, r.mce, r.mass_weighted_mce, r.ace, r.classwise_ece, r.noise_floor) for r in parts]
        averages = np.average(measures, axis=0, weights=[r.count for r in parts])
        ece, mce, mass_weighted, ace, classwise, floor = averages.tolist()
    if published is not None and published.measures is not None:
        ece, mce, ace = published.measures(confidence, correct, bins)
    return CalibrationReport(
        count=count,
        accuracy=accuracy,
        confidence=float(confidence.mean()),
        ece=ece,
        noise_floor=floor,
        mce=mce,
        mass_weighted_mce=mass_weighted,
        ace=ace,
        classwise_ece=classwise,
        brier=float(brier / count),
        nll=float(nll / count),
        bins=table,
        scheme=scheme,
        protocol=protocol if convention is None else convention,
    )


@arguments.checked
def fit_temperature(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """The T in `TEMPERATURES` whose `softmax(logits / T)` has the least NLL on `labels`; use held-out data.

    `logits` (N, K) finite, `labels` (N,) integers. float64, safeguarded one-dimensional search; nothing gets
    a gradient. Where NLL has no minimum inside the range the nearer end is returned with a RuntimeWarning:
    1e-3 if (almost) every sample is right, so that T -> 0, and 1e3 if the logits predict no better than
    chance. Where NLL does not depend on T (one class, constant rows) T is 1. RuntimeError if NLL would rise
    over T = 1. Source: Guo et al. 2017, section 4.2.
    """
    z, y = check_labelled(logits, labels, "logits")

    def slope(beta: float) -> float:
        return _temperature_sums(z, y, beta).slope

    at_one = _temperature_sums(z, y, 1.0)
    if at_one.spread == 0.0:
        return 1.0
    temperature = 1.0 / _increasing_root(slope, 0.0, "NLL has no minimum")
    before, after = at_one.nll, _temperature_sums(z, y, 1.0 / temperature).nll
    if not after <= before + 1e-9 * (1.0 + abs(before)):
        raise RuntimeError(
            f"temperature {temperature:g} raises NLL from {before:.6g} to {after:.6g}; the logits are suspect"
        )
    return temperature


@arguments.checked
def temperature_matching_confidence(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """The T in `TEMPERATURES` at which mean confidence equals accuracy (|gap| <= 1e-3); VRF's rule.

    Arguments as in `fit_temperature`. At accuracy 1 the gap of 1e-3 is used up, which keeps T away from zero.
    Where no T in the range meets it (accuracy below 1/K), the nearer end is returned with a RuntimeWarning.
    Source: VRF, arXiv 2411.06966.
    """
    z, y = check_labelled(logits, labels, "logits")
    at_one = _temperature_sums(z, y, 1.0)
    if at_one.spread == 0.0:
        return 1.0
    target = min(at_one.accuracy, 1.0 - CONFIDENCE_TOLERANCE)

    def confidence(beta: float) -> float:
        return _temperature_sums(z, y, beta).confidence

    return 1.0 / _increasing_root(confidence, target, "mean confidence cannot meet accuracy")


class _TemperatureSums(NamedTuple):
    nll: float
    slope: float  # d NLL / d beta
    confidence: float
    accuracy: float
    spread: float  # max over rows of max_k z - min_k z: zero means that no temperature changes anything


def _temperature_sums(z: Tensor, y: Tensor, beta: float) -> _TemperatureSums:
    nll = slope = confidence = accuracy = spread = 0.0
    for start in range(0, len(z), _ROWS):
        t = y[start : start + _ROWS, None]
        rows = z[start : start + _ROWS].double()
        shifted = rows - rows.amax(1, keepdim=True)
        weights = torch.exp(beta * shifted)
        partition = weights.sum(1)
        true = shifted.gather(1, t).squeeze(1)
        nll += float((partition.log() - beta * true).sum())
        slope += float(((weights * shifted).sum(1) / partition - true).sum())
        confidence += float((1.0 / partition).sum())
        accuracy += float((shifted.argmax(1) == t.squeeze(1)).sum())
        spread = max(spread, -float(shifted.min()))
    n = len(z)
    return _TemperatureSums(nll / n, slope / n, confidence / n, accuracy / n, spread)


def _increasing_root(function: Callable[[float], float], target: float, failure: str) -> float:
    """beta in 1 / TEMPERATURES with function(beta) = target, by Ridders' method on log beta (the bracket at
    least halves)."""
    low, high = -math.log(TEMPERATURES[1]), -math.log(TEMPERATURES[0])

    def f(u: float) -> float:
        return function(math.exp(u)) - target

    f_low, f_high = f(low), f(high)
    if f_low >= 0.0 or f_high <= 0.0:
        end, remedy = TEMPERATURES[0], "(almost) no sample is wrong: hold out more, or match confidence to accuracy"
        if f_low >= 0.0:
            end, remedy = TEMPERATURES[1], "no better than chance: check that labels and classes are in one order"
        message = f"{failure} for temperatures in {TEMPERATURES}; returning {end:g}, {remedy}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return 1.0 / end
    guess = math.inf
    while high - low > 1e-10:
        middle = 0.5 * (low + high)
        f_middle = f(middle)
        # sqrt(f_middle^2 - f_low f_high), without its underflow
        root = math.hypot(f_middle, math.sqrt(-f_low) * math.sqrt(f_high))
        previous, guess = guess, min(max(middle - (middle - low) * f_middle / root, low), high)
        # Quadratic convergence: when a step is this small, the guess it led to is exact to rounding.
        if abs(guess - previous) < 1e-6:
            break
        for u, value in sorted(((middle, f_middle), (guess, f(guess)))):
            if value == 0.0:
                return math.exp(u)
            if value < 0.0 and u > low:
                low, f_low = u, value
            if value > 0.0 and u < high:
                high, f_high = u, value
    return math.exp(guess)


def check_labelled(values: Tensor | np.ndarray, labels: Tensor | np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    values, labels = arguments.array(name, values).detach(), arguments.array("labels", labels).detach()
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be a non-empty (N, K) array, got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}")
    if labels.shape != values.shape[:1]:
        raise ValueError(f"labels must have shape ({len(values)},) to match {name}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    if int(labels.min()) < 0 or int(labels.max()) >= values.shape[1]:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels must lie in [0, {values.shape[1] - 1}], got values from {low} to {high}")
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).any(1).sum())
        raise ValueError(f"{name} must be finite, but {bad} of {len(values)} rows hold NaN or infinity")
    if name == "probabilities":  # numpy does the rest of a report; a temperature stays on the logits' device
        return values.cpu(), labels.cpu()
    return values, labels.to(values.device)


def distributions(p: Tensor, start: int) -> np.ndarray:
    """A writable float64 copy within [0, 1], or a ValueError that says why the rows are no distributions."""
    tolerance = 1e-3 if p.dtype in (torch.float32, torch.float64) else 2e-2
    q = p.double().numpy().copy()
    advice = "softmax first, e.g. logits.softmax(-1) with logits = logit_scale * cosines"
    if q.min() < -tolerance or q.max() > 1.0 + tolerance:
        raise ValueError(
            f"probabilities must lie in [0, 1], got values from {q.min():.4g} to {q.max():.4g}; "
            f"these look like logits: {advice}"
        )
    sums = q.sum(1)
    worst = int(np.abs(sums - 1.0).argmax())
    if abs(sums[worst] - 1.0) > tolerance:
        raise ValueError(
            f"probabilities must sum to 1 along each row, but row {start + worst} sums to {sums[worst]:.4g}; "
            f"these look like logits or cosines: {advice}"
        )
    return np.clip(q, 0.0, 1.0, out=q)


def _width_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Index of the right-closed bin ((k/B, (k+1)/B], 0 in the first): how many inner edges are strictly
    below."""
    return np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")


def _assign(confidence: np.ndarray, bins: int, scheme: str) -> np.ndarray:
    if scheme == "width":
        return _width_bins(confidence, bins)
    # By the number of strictly smaller confidences, so that ties share a bin and the order of samples is
    # irrelevant.
    below = np.searchsorted(np.sort(confidence), confidence, side="left")
    return below * bins // len(confidence)


def _table(confidence: np.ndarray, correct: np.ndarray, index: np.ndarray, scheme: str, bins: int) -> tuple[Bin, ...]:
    counts = np.bincount(index, minlength=bins)
    sums = np.bincount(index, confidence, bins), np.bincount(index, correct, bins)
    rows: list[Bin] = []
    for b in np.flatnonzero(counts):
        lower, upper = float(b / bins), float((b + 1) / bins)
        if scheme != "width":
            lower, upper = rows[-1].upper if rows else 0.0, float(confidence[index == b].max())
        n = int(counts[b])
        rows.append(Bin(lower, upper, n, float(sums[0][b] / n), float(sums[1][b] / n)))
    return tuple(rows)


def top_label_ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[float, float]:
    """ECE in equal-width bins, and its noise floor, of confidences (N,) float64 and whether each is right (N,)."""
    table = _table(confidence, correct, _width_bins(confidence, bins), "width", bins)
    return _ece(table), _noise_floor(confidence, bins, "width")


def _ece(table: tuple[Bin, ...]) -> float:
    return sum(b.count * abs(b.accuracy - b.confidence) for b in table) / sum(b.count for b in table)


def _noise_floor(confidence: np.ndarray, bins: int, scheme: str) -> float:
    index = _assign(confidence, bins, scheme)
    parts = (confidence[index == b] for b in np.unique(index))
    return sum(_mean_absolute_deviation(c) for c in parts) / len(confidence)


def _mean_absolute_deviation(c: np.ndarray) -> float:
    """E|S - E S| for S the sum of independent Bernoulli(c_i).

    Above a variance of 100 the normal value sqrt(2 var / pi) is right to 0.1 %. Below it, the distribution of
    S comes exactly from its characteristic function at M points, prod_i (1 - c_i + c_i e^{jw}): S stays
    within M / 2 of its mean.
    """
    mean, variance = float(c.sum()), float((c * (1.0 - c)).sum())
    if variance > 100.0:
        return math.sqrt(2.0 * variance / math.pi)
    size = 64 + 16 * math.ceil(math.sqrt(variance))
    centre = round(mean)
    points = np.exp(2j * np.pi * np.arange(size // 2 + 1) / size)
    transform = np.array([np.prod(1.0 + c * (point - 1.0)) for point in points]) * points**-centre
    # irfft inverts sum_k P(k) e^{-jwk}, hence the conjugate.
    probability = np.fft.irfft(transform.conj(), size)
    offset = np.fft.fftfreq(size, 1.0 / size)
    return float(np.abs(offset + centre - mean) @ probability)
