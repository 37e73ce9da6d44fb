"""Prediction sets with a guarantee: split conformal prediction, on probabilities p (N, K) of held-out labelled data.

A score s(p, k) says how badly class k fits an image. With the scores s_i = s(p_i, y_i) of n held-out images,

    q       the ceil((n + 1) c)-th smallest of s_1 .. s_n             c the coverage asked for
    S(p)    {k : s(p, k) <= q}

holds the true class of a new image with probability at least c, and below c + 1 / (n + 1) where no scores are equal.
This is over the draw of held-out and new images alike, if they are exchangeable: nothing is promised under shift, for
a single class or for a single image. With r the rank of k in p, 1 for the most probable class:

    thr     1 - p_k                                          smallest sets on average (Sadinle et al. 2019)
    aps     sum of p_j over the classes before k, + u p_k    larger sets for harder images (Romano et al. 2020)
    raps    aps + lambda max(0, r - k_reg)                   the same without long tails (Angelopoulos et al. 2021)

u = 1, or uniform in (0, 1) where sets are randomized. Classes of equal probability are ranked by their number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.calibration.measures import check_labelled, distributions
from robustft.data.seeds import stateless_generator
from robustft.files import CONFORMAL_FILE, load_fitted, place, refusing, save_fitted
from robustft.ops import arguments

if TYPE_CHECKING:
    from robustft.clip.outputs import Outputs

RULES = ("thr", "aps", "raps")
PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
"""Among which RAPS looks for its lambda, as the authors' code does."""
SIZES = (0, 2, 4, 11, 101, 1001)
"""Where the strata of set sizes begin, as in the RAPS paper: 0-1, 2-3, 4-10, 11-100, 101-1000, more."""
BAND = 0.95

_ROWS = 8192  # rows that are sorted at a time


class _Scored(NamedTuple):
    rows: slice
    p: np.ndarray  # (n, K) float64
    scores: np.ndarray  # (n, K)


class ConformalSets:
    """Sets of classes that hold the true one with probability at least `coverage`.

    Learnt: `threshold_` q, `classes_` K, `count_` n, the images that q is of; of RAPS also `k_reg_` and `penalty_`
    lambda. Memory: a float64 copy of 8192 rows.

    Args:
        rule: "thr", "aps" or "raps".
        coverage: c, in (0, 1).
        empty: whether a set may be empty, as the rules have it: by default it then holds the most probable class. The
            guarantee stays, and coverage is at least the accuracy.
        randomized: of "aps" and "raps": draws u, by which coverage comes as close to c as for continuous scores, and
            sets become smaller. u is a function of `seed` and of the row's number in the call.
        k_reg, penalty: of "raps". By default they are chosen on `tuning` of the held-out images, which q then is not
            of, drawn by `seed`: k_reg as the rank within which the true class is in a share c of them, lambda among
            `PENALTIES` as that of the smallest sets on them.

    ValueError for options out of range, and for those of another rule. Sources: as above; the quantile is that of
    Vovk et al. 2005.
    """

    @arguments.checked
    def __init__(
        self,
        rule: str = "thr",
        coverage: float = 0.9,
        *,
        empty: bool = False,
        randomized: bool = False,
        seed: int = 0,
        k_reg: int | None = None,
        penalty: float | None = None,
        tuning: float = 0.2,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
        for name, value in (("coverage", coverage), ("tuning", tuning)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} must lie in (0, 1), got {value!r}")
        if randomized and rule == "thr":
            raise ValueError("randomized is of 'aps' and 'raps': 'thr' draws nothing")
        if rule != "raps" and (k_reg is not None or penalty is not None):
            raise ValueError(f"k_reg and penalty are of 'raps', got rule {rule!r}")
        if k_reg is not None and (not isinstance(k_reg, int) or k_reg < 0):
            raise ValueError(f"k_reg must be an integer of at least 0, got {k_reg!r}")
        if penalty is not None and not 0.0 <= penalty < math.inf:
            raise ValueError(f"penalty must be a number of at least 0, got {penalty!r}")
        self.rule, self.coverage, self.empty, self.randomized = rule, float(coverage), bool(empty), bool(randomized)
        self.seed, self.k_reg, self.penalty, self.tuning = seed, k_reg, penalty, float(tuning)

    def fit(
        self, probabilities: Tensor | np.ndarray | Outputs, labels: Tensor | np.ndarray | None = None
    ) -> ConformalSets:
        """Learns the threshold of held-out probabilities (N, K) and labels (N,), or of `Outputs` with both.

        Returns self. Nothing gets a gradient. The data may be those that a temperature was fitted on, at a small price:
        its one number hardly depends on a single image; data that trained the model may not. ValueError for rows that
        are no distributions, and for fewer images than the coverage needs, ceil(c / (1 - c)): the set that keeps the
        promise would be that of all classes.
        """
        p, y = _labelled(probabilities, labels)
        rows = np.arange(len(p))
        k_reg, penalty = self.k_reg, self.penalty
        if self.rule == "raps" and (k_reg is None or penalty is None):
            drawn = torch.randperm(len(p), generator=stateless_generator(self.seed, "conformal tuning")).numpy()
            size = round(self.tuning * len(p))
            tuning, rows = np.sort(drawn[:size]), np.sort(drawn[size:])
            k_reg, penalty = self._tuned(p[tuning], y[tuning], k_reg, penalty)
        self.k_reg_, self.penalty_ = k_reg or 0, penalty or 0.0
        scores = self._true_scores(p[rows], y[rows], "fit", self.k_reg_, self.penalty_)
        self.threshold_ = _quantile(scores, self.coverage)
        self.classes_, self.count_ = p.shape[1], len(rows)
        return self

    def sets(self, probabilities: Tensor | np.ndarray | Outputs) -> Tensor:
        """The sets of probabilities (N, K), or of `Outputs`: bool (N, K) on the CPU. ValueError before `fit`."""
        self._check_fitted()
        p = _probabilities(probabilities)
        if p.ndim != 2 or p.shape[1] != self.classes_ or not p.is_floating_point():
            raise ValueError(
                f"probabilities must be floating (N, {self.classes_}), the classes of the fit, got "
                f"{tuple(p.shape)} {p.dtype}"
            )
        return self._sets(p, "sets", self.k_reg_, self.penalty_, self.threshold_)

    @arguments.checked
    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all, and returns its path; `load` gives the sets back.

        path: a directory, such as `Classifier.save` wrote, where it becomes conformal.safetensors, or a file.
        """
        self._check_fitted()
        path = place(path, CONFORMAL_FILE)
        options = {name: value for name, value in vars(self).items() if not name.endswith("_")}
        learnt = {"k_reg": self.k_reg_, "classes": self.classes_, "count": self.count_}
        numbers = {"threshold": self.threshold_, "penalty": self.penalty_}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        save_fitted(path, "ConformalSets", {"options": options, **learnt}, tensors)
        return path

    @classmethod
    @arguments.checked
    def load(cls, path: str | Path) -> ConformalSets:
        """What `save` wrote, bit for bit; ValueError for a damaged file, FileNotFoundError for none."""
        path = place(path, CONFORMAL_FILE)
        settings, tensors = load_fitted(path, "ConformalSets")
        with refusing(path, "ConformalSets"):
            found = cls(**settings["options"])
            found.threshold_, found.penalty_ = float(tensors["threshold"]), float(tensors["penalty"])
            if not math.isfinite(found.threshold_) or not 0.0 <= found.penalty_ < math.inf:
                raise ValueError(f"threshold and penalty must be finite, got {found.threshold_} and {found.penalty_}")
            for name, least in (("k_reg", 0), ("classes", 1), ("count", 1)):
                value = settings[name]
                if type(value) is not int or value < least:
                    raise ValueError(f"{name} must be an integer of at least {least}, got {value!r:.80}")
                setattr(found, f"{name}_", value)
        return found

    def __repr__(self) -> str:
        fitted = f", threshold {self.threshold_:.4g} of {self.count_} images" if hasattr(self, "threshold_") else ""
        return f"ConformalSets({self.rule!r}, coverage={self.coverage}{fitted})"

    def _check_fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise ValueError("ConformalSets has learnt nothing yet: call fit(probabilities, labels)")

    def _scores(self, p: Tensor, use: str, k_reg: int, penalty: float) -> Iterator[_Scored]:
        """s(p, k) of all classes, some rows at a time."""
        u = np.ones(len(p))
        if self.randomized:
            generator = stateless_generator(self.seed, "conformal", use)
            u = torch.rand(len(p), generator=generator, dtype=torch.float64).numpy()
        beyond = np.maximum(np.arange(1, p.shape[1] + 1) - k_reg, 0)
        for start in range(0, len(p), _ROWS):
            rows = slice(start, start + _ROWS)
            q = distributions(p[rows], start)
            if self.rule == "thr":
                yield _Scored(rows, q, 1.0 - q)
                continue
            order = np.argsort(-q, axis=1, kind="stable")
            falling = np.take_along_axis(q, order, 1)
            scores = np.empty_like(q)
            ranked = falling.cumsum(1) - (1.0 - u[rows, None]) * falling + penalty * beyond
            np.put_along_axis(scores, order, ranked, 1)
            yield _Scored(rows, q, scores)

    def _true_scores(self, p: Tensor, y: np.ndarray, use: str, k_reg: int, penalty: float) -> np.ndarray:
        parts = self._scores(p, use, k_reg, penalty)
        return np.concatenate([np.take_along_axis(scores, y[rows, None], 1)[:, 0] for rows, _, scores in parts])

    def _sets(self, p: Tensor, use: str, k_reg: int, penalty: float, threshold: float) -> Tensor:
        sets = np.zeros(p.shape, bool)
        for rows, q, scores in self._scores(p, use, k_reg, penalty):
            sets[rows] = scores <= threshold
            if not self.empty:
                np.put_along_axis(sets[rows], q.argmax(1)[:, None], True, 1)
        return torch.from_numpy(sets)

    def _tuned(self, p: Tensor, y: np.ndarray, k_reg: int | None, penalty: float | None) -> tuple[int, float]:
        needed = minimum_count(self.coverage)
        if len(p) < needed:
            raise ValueError(
                f"'raps' chooses k_reg and penalty on {self.tuning:g} of the images, which are {len(p)}; coverage "
                f"{self.coverage:g} needs {needed}: hold out more, or pass k_reg and penalty"
            )
        if k_reg is None:
            q = p.double().numpy()
            true = np.take_along_axis(q, y[:, None], 1)
            before = (q > true) | (q == true) & (np.arange(q.shape[1]) < y[:, None])
            k_reg = int(_quantile(1.0 + before.sum(1), self.coverage))
        if penalty is None:

            def mean_size(candidate: float) -> float:
                threshold = _quantile(self._true_scores(p, y, "tuning", k_reg, candidate), self.coverage)
                return float(self._sets(p, "tuning", k_reg, candidate, threshold).sum(1).double().mean())

            penalty = min(PENALTIES, key=mean_size)
        return k_reg, penalty


class Coverage(NamedTuple):
    """Some images' sets: how many, the share that hold the true class with its band, and their mean size.

    `lower` and `upper` are the 95 % Clopper-Pearson interval: binomial noise explains the distance of any share in it.
    All but the count and label are NaN for no images.
    """

    label: str
    images: int
    coverage: float
    lower: float
    upper: float
    mean_size: float


class CoverageReport(NamedTuple):
    """`coverage_report`'s: of all images, of those with sets of like size, and of those of each class (K)."""

    all: Coverage
    by_size: tuple[Coverage, ...]
    by_class: tuple[Coverage, ...]


@arguments.checked
def coverage_report(
    sets: Tensor | np.ndarray, labels: Tensor | np.ndarray, classes: Sequence[str] = ()
) -> CoverageReport:
    """How often prediction sets (N, K) bool hold the label (N,), and how large they are.

    By set size in the strata of `SIZES`, of those that occur: a rule that is no more than right on average gives large
    sets to hard images and still misses them (Angelopoulos et al. 2021). By class: `classes` are their names, numbers
    where none are given. ValueError for other shapes, no images, and labels out of [0, K).
    """
    sets, labels = arguments.array("sets", sets).detach().cpu(), arguments.array("labels", labels).detach().cpu()
    if sets.dtype != torch.bool:
        raise TypeError(f"sets must be bool, got {sets.dtype}")
    _, labels = check_labelled(sets.float(), labels, "sets")
    if len(classes) and len(classes) != sets.shape[1]:
        raise ValueError(f"classes must be {sets.shape[1]} names, one for each column of sets, got {len(classes)}")
    y = labels.numpy()
    hit, size = sets.numpy()[np.arange(len(y)), y], sets.sum(1).numpy()
    ends = (*SIZES[1:], math.inf)
    labelled = [f"{low}-{end - 1}" for low, end in itertools.pairwise(SIZES)] + [f"over {SIZES[-1] - 1}"]
    strata = [(size >= low) & (size < end) for low, end in zip(SIZES, ends, strict=True)]
    names = list(classes) or [str(k) for k in range(sets.shape[1])]
    return CoverageReport(
        _coverage("all", np.ones(len(y), bool), hit, size),
        tuple(_coverage(label, rows, hit, size) for label, rows in zip(labelled, strata, strict=True) if rows.any()),
        tuple(_coverage(name, y == k, hit, size) for k, name in enumerate(names)),
    )


@arguments.checked
def minimum_count(coverage: float) -> int:
    """The least n of held-out images for which the ceil((n + 1) c)-th smallest score exists: ceil(c / (1 - c))."""
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"coverage must lie in (0, 1), got {coverage!r}")
    c = Fraction(str(coverage))
    return math.ceil(c / (1 - c))


def _quantile(scores: np.ndarray, coverage: float) -> float:
    # In fractions: 0.9 x 10 is 9, in floating point of other numbers a little more, which is one rank higher.
    rank = math.ceil((len(scores) + 1) * Fraction(str(coverage)))
    if rank > len(scores):
        raise ValueError(
            f"coverage {coverage:g} needs at least {minimum_count(coverage)} held-out images, got {len(scores)}: "
            "hold out more, or ask for less"
        )
    return float(np.partition(scores, rank - 1)[rank - 1])


def _coverage(label: str, rows: np.ndarray, hit: np.ndarray, size: np.ndarray) -> Coverage:
    from scipy.special import betaincinv

    n, k = int(rows.sum()), int(hit[rows].sum())
    if not n:
        return Coverage(label, 0, *[math.nan] * 4)
    tail = (1.0 - BAND) / 2.0
    lower = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    upper = float(betaincinv(k + 1, n - k, 1.0 - tail)) if k < n else 1.0
    return Coverage(label, n, k / n, lower, upper, float(size[rows].mean()))


def _probabilities(given: Tensor | np.ndarray | Outputs) -> Tensor:
    return arguments.array("probabilities", getattr(given, "probabilities", given)).detach().cpu()


def _labelled(given: Tensor | np.ndarray | Outputs, labels: Tensor | np.ndarray | None) -> tuple[Tensor, np.ndarray]:
    if labels is None:
        labels = getattr(given, "labels", None)
    if labels is None:
        raise ValueError("labels are missing: pass them, or outputs that hold them")
    p, y = check_labelled(_probabilities(given), labels, "probabilities")
    return p, y.numpy()
