"""VRF: variance reduction fine-tuning (Zhu, Cui, Zhang, NeurIPS 2024, arXiv 2411.06966).

u (N, D), z_zs, z_ft (N, K)     as in vrf_features.py

V = { u_i : zero-shot wrong, fine-tuned right }               the failure set, from ID training data
d = squared distance of u to its k-th nearest member of V
w = sigmoid(-(d - a) / b)                                     near V the fine-tuned model has the say
p = w softmax(z_ft / T_ft) + (1 - w) softmax(z_zs / T_zs)

Among samples near V the fine-tuned model is the better by far, among distant ones hardly or not at all: the ratio of
accuracies falls with d (`VRF.accuracy_ratio`), and errors that are independent are best mixed in its proportion.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robustft.clip.outputs import Outputs
from robustft.ensembles.output_ensemble import (
    PairPredictor,
    TemperatureRule,
    check_pair,
    check_temperatures,
    fitted_temperatures,
    mix,
)
from robustft.ensembles.vrf_features import RatioBin, VRFFeatures, ratio_bins
from robustft.ensembles.vrf_weights import ROWS, WEIGHTINGS, GridPoint, centre, grid, scores, weigh
from robustft.ensembles.wise_ft import check_alpha
from robustft.files import load_fitted, refusing, save_fitted
from robustft.neighbors import NeighborIndex
from robustft.ops.arguments import FLOATS
from robustft.ops.kinds import checked, described, has_numbers
from robustft.ops.precision import at_least_float32
from robustft.predictors.base import Predictor
from robustft.predictors.logits import mixture_log_probabilities

FEW_FAILURES = 20  # below it a distance to V says more about single samples than about a region


class VRF:
    """Ensemble of a zero-shot and a fine-tuned classifier, weighed sample by sample; nothing is trained.

        vrf = VRF().fit(VRFFeatures.of(zs, ft, train), VRFFeatures.of(zs, ft, validation))
        vrf.probabilities(features)        # of VRFFeatures
        vrf.classifier(zs, ft)             # of images: a Predictor as any other

    Learnt by `fit`: `failure_set_` (M, D), `k_`, `a_`, `b_`, `temperatures_` (zero-shot, fine-tuned), `grid_` (a
    `GridPoint` for each pair tried), `validation_distances_` (N,).

    The distance is squared, as in the released code and by the paper's own values (the text says L2). The paper's
    a = 1.5, b = 0.6 belong to features of one model on ImageNet; elsewhere distances have another scale (CIFAR-10:
    0.3 and 0.3). So a and b are searched over a grid that is moved and stretched with the validation distances
    (`vrf_weights.grid`). The released code chooses them, and the temperatures, on the ID test set; here it is held-out
    ID data, by accuracy. Many pairs tie there, as they do in the paper's table. Of these the one with the smallest mean
    weight of the fine-tuned model is taken, a rule of ours: what ID data cannot decide is left to the model that has
    seen more than ID data. `grid_` has the scores for another choice.

    Args:
        k: which neighbour; None for the paper's max(1, floor(0.001 M)), "released" for max(1, round(1000 M / N)), of
            a training set of N.
        a, b: the weight's centre and width, in squared distance: a number, several to choose from, or None for the
            grid above.
        temperatures: "confidence", mean confidence equal to accuracy (released), "nll", a pair of numbers, or None
            for (1, 1).
        weighting: "sigmoid"; or of the paper's ablations "linear", here clip(1/2 - (d - a) / 4b, 0, 1), the
            sigmoid's tangent at a, and "binary", 1 where d <= a, which has no b.
        reference: "failures", or for the ablation "train", distances to all training samples.

    Raises ValueError or TypeError naming the argument.

    Source: Zhu, Cui, Zhang, VRF (NeurIPS 2024, arXiv 2411.06966), and its released code.
    """

    def __init__(
        self,
        k: int | Literal["released"] | None = None,
        a: float | Sequence[float] | None = None,
        b: float | Sequence[float] | None = None,
        *,
        temperatures: TemperatureRule | tuple[float, float] | None = "confidence",
        weighting: Literal["sigmoid", "linear", "binary"] = "sigmoid",
        reference: Literal["failures", "train"] = "failures",
    ) -> None:
        named = k is None or isinstance(k, str) and k == "released"
        if not named and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f'k must be a positive integer, "released" or None, got {k!r}')
        if not isinstance(weighting, str) or weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(map(repr, WEIGHTINGS))}, got {weighting!r}")
        if not isinstance(reference, str) or reference not in ("failures", "train"):
            raise ValueError(f'reference must be "failures" or "train", got {reference!r}')
        if weighting == "binary" and b is not None:
            raise ValueError('weighting="binary" has no width: leave b at None')
        self.k, self.a, self.b = k, _choices(a, "a"), _choices(b, "b")
        if self.b is not None and min(self.b) <= 0.0:
            raise ValueError(f"b must be positive, got {b}")
        self.temperatures = check_temperatures(temperatures)
        self.weighting = weighting
        self.reference = reference
        self._index: NeighborIndex | None = None

    @checked
    def fit(self, train: VRFFeatures, validation: VRFFeatures) -> VRF:
        """Collects the failure set of ID training data; chooses temperatures, a and b on held-out ID data.

        ValueError when no training sample is a failure, or fewer than k are. Warns when they are so few that a
        distance says little, and when the validation set holds no error to choose by.
        """
        self.failure_set_ = self._reference_set(train)
        self._index = None
        self.k_ = self._neighbor(len(self.failure_set_), len(train))
        zero_shot, fine_tuned = validation.correct()
        self.temperatures_ = fitted_temperatures(
            self.temperatures, validation.zero_shot.logits, validation.fine_tuned.logits, validation.labels
        )
        self.validation_distances_ = self.distances(validation.features)
        pairs = grid(self.validation_distances_, self.a, self.b, self.weighting)
        if len(pairs) > 1 and bool((zero_shot & fine_tuned).all()):
            warnings.warn(
                f"neither classifier errs on any of the {len(validation)} validation samples, which cannot tell one a "
                "and b from another, so those that lean most on the zero-shot classifier are taken: hold out more "
                "data, that the fine-tuning has not seen, or pass a and b",
                stacklevel=3,
            )
        self.grid_ = scores(pairs, validation, self.validation_distances_, self.temperatures_, self.weighting)
        best = min(self.grid_, key=lambda point: (-point.accuracy, point.weight, point.nll))
        self.a_, self.b_ = best.a, best.b
        return self

    @checked
    def distances(self, features: Tensor) -> Tensor:
        """d of unit features (N, D): squared distance to the k-th nearest of the failure set, (N,); no gradient."""
        self._check_fitted()
        members = self.failure_set_
        if features.ndim != 2 or features.shape[1] != members.shape[1] or features.dtype not in FLOATS:
            raise ValueError(f"features is {described(features)}; expected floating (N, {members.shape[1]}), as in fit")
        if has_numbers(features) and not bool(features.isfinite().all()):
            raise ValueError("features holds NaN or infinity; expected finite numbers")
        if self._index is None or self._index.points.device != features.device:
            self._index = NeighborIndex(self.failure_set_.to(features.device))
        return self._index.kth_distance(features.to(self.failure_set_.dtype), self.k_)

    @checked
    def weights(self, features: Tensor) -> Tensor:
        """w of unit features (N, D): the fine-tuned model's share of each sample, (N,) in [0, 1]."""
        return self.weights_at(self.distances(features))

    @checked
    def weights_at(self, distances: Tensor) -> Tensor:
        """w of squared distances (N,)."""
        if not distances.is_floating_point():
            raise TypeError(f"distances is {described(distances)}; expected floating (N,)")
        return weigh(distances, self.a_, self.b_, self.weighting)

    @checked
    def log_probabilities(self, features: VRFFeatures) -> Tensor:
        """log p (N, K), at least float32, some thousand rows at a time; a sample's is the same among any others."""
        parts = [
            mixture_log_probabilities(
                at_least_float32(part.zero_shot.logits),
                at_least_float32(part.fine_tuned.logits),
                self.weights(part.features),
                self.temperatures_,
            )
            for part in features.rows(ROWS)
        ]
        return torch.cat(parts) if parts else at_least_float32(features.fine_tuned.logits)

    @checked
    def probabilities(self, features: VRFFeatures) -> Tensor:
        """p (N, K), at least float32."""
        return self.log_probabilities(features).exp()

    @checked
    def at(self, alpha: float) -> VRF:
        """The same with a moved so that the mean weight on the validation set is alpha: a frontier's parameter.

        0 is the zero-shot classifier and 1 the fine-tuned one, as for WiSEFT and OutputEnsemble. At the same alpha
        VRF and OSE differ only in who gets which share.
        """
        check_alpha(alpha)
        self._check_fitted()
        moved = copy.copy(self)
        moved.a_ = centre(self.validation_distances_.double(), alpha, self.b_, self.weighting)
        return moved

    @property
    def alpha_(self) -> float:
        """The fine-tuned model's mean weight on the validation set."""
        return float(self.weights_at(self.validation_distances_.double()).mean())

    @checked
    def accuracy_ratio(self, data: VRFFeatures, bins: int = 10) -> tuple[RatioBin, ...]:
        """The paper's analysis (section 3): acc_ft / acc_zs of labelled data, in bins of equal size by distance.

        VRF helps where `ratio` falls from the first bin to the last, under shift above all; `weight` should follow it.
        """
        distances = self.distances(data.features)
        return ratio_bins(data, distances, self.weights_at(distances), bins)

    @checked
    def classifier(self, zero_shot: Predictor, fine_tuned: Predictor) -> VRFClassifier:
        """The ensemble as a predictor of images; the two that the features of `fit` came from."""
        self._check_fitted()
        return VRFClassifier(zero_shot, fine_tuned, self)

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes what `fit` learnt as one safetensors file, whole or not at all; not the two classifiers."""
        self._check_fitted()
        settings = {
            "k": self.k_,
            "a": self.a_ if math.isfinite(self.a_) else str(self.a_),  # of `at(0)` and `at(1)`: JSON has no infinity
            "b": self.b_,
            "temperatures": self.temperatures_,
            "weighting": self.weighting,
            "reference": self.reference,
            "grid": self.grid_,
        }
        tensors = {"failure_set": self.failure_set_, "validation_distances": self.validation_distances_}
        save_fitted(Path(path), "VRF", settings, tensors)
        return Path(path)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> VRF:
        """What `save` wrote, on the CPU. FileNotFoundError where there is no file, ValueError for any other one."""
        path = Path(path)
        settings, tensors = load_fitted(path, "VRF")
        with refusing(path, "VRF"):
            vrf = cls(
                settings["k"],
                temperatures=check_pair(settings["temperatures"]),
                weighting=settings["weighting"],
                reference=settings["reference"],
            )
            vrf.failure_set_ = tensors["failure_set"]
            vrf.validation_distances_ = tensors["validation_distances"]
            vrf.a_, vrf.b_ = float(settings["a"]), float(settings["b"])
            vrf.k_ = vrf._neighbor(len(vrf.failure_set_), 1)
            vrf.temperatures_ = check_pair(settings["temperatures"])
            vrf.grid_ = tuple(GridPoint(*point) for point in settings["grid"])
            vrf._check_learnt()
        return vrf

    def _check_learnt(self) -> None:
        """ValueError for what no `fit` learns: it comes from a file."""
        members, distances = self.failure_set_, self.validation_distances_
        if members.ndim != 2 or distances.ndim != 1 or not len(distances):
            raise ValueError(
                f"failure set (M, D) and distances (N,) are {tuple(members.shape)}, {tuple(distances.shape)}"
            )
        if not (bool(members.isfinite().all()) and bool(distances.isfinite().all())):
            raise ValueError("failure set and distances must be finite, but hold NaN or infinity")
        if math.isnan(self.a_) or not 0.0 <= self.b_ < math.inf or (self.b_ == 0.0) != (self.weighting == "binary"):
            raise ValueError(f"a and b of a {self.weighting} weight are {self.a_} and {self.b_}")

    def _check_fitted(self) -> None:
        if not hasattr(self, "failure_set_"):
            raise ValueError("VRF has no failure set yet: call fit(train, validation), or VRF.load(path)")

    def _reference_set(self, train: VRFFeatures) -> Tensor:
        failures = train.failures()
        if self.reference == "train":
            return train.features
        count = int(failures.sum())
        if count == 0:
            raise ValueError(
                f"the failure set is empty: no sample of the {len(train)} is one that the zero-shot classifier gets "
                "wrong and the fine-tuned one right. Pass more training data, or features of the model that was "
                "fine-tuned on it; where zero-shot makes no error, there is nothing to mix, and OutputEnsemble serves"
            )
        if count < FEW_FAILURES:
            warnings.warn(
                f"the failure set has {count} samples only (of {len(train)}): distances to it say little; pass more "
                "training data, or compare with OutputEnsemble",
                stacklevel=4,
            )
        return train.features[failures]

    def _neighbor(self, size: int, samples: int) -> int:
        match self.k:
            case None:
                k = max(1, size // 1000)
            case "released":
                k = max(1, round(1000 * size / samples))
            case k:
                pass
        if k > size:
            raise ValueError(f"k = {k} is larger than the {self.reference} set of {size}: pass a smaller k, or k=None")
        return k


class VRFClassifier(PairPredictor):
    """VRF on images: log-probabilities as logits, cosines mixed alike, fine-tuned features.

    Two encoders an image, or one where both classifiers share theirs (a linear probe).
    """

    kind = "VRF"  # whose file lies beside the members

    @checked
    def __init__(self, zero_shot: Predictor, fine_tuned: Predictor, vrf: VRF) -> None:
        super().__init__(zero_shot, fine_tuned)
        self.vrf = vrf

    def write(self, path: Path) -> None:
        self.vrf.save(path)

    @classmethod
    def read(cls, path: Path, members: Mapping[str, Predictor]) -> VRFClassifier:
        return cls(**members, vrf=VRF.load(path))

    @property
    def alpha_(self) -> float:
        return self.vrf.alpha_

    def at(self, alpha: float) -> VRFClassifier:
        """The classifier of `VRF.at(alpha)`."""
        return VRFClassifier(self.zero_shot, self.fine_tuned, self.vrf.at(alpha))

    def combine(self, zero_shot: Outputs, fine_tuned: Outputs) -> Outputs:
        return mix(zero_shot, fine_tuned, self.vrf.weights(fine_tuned.features), self.vrf.temperatures_)

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> VRFClassifier:
        """Each member restricted before its own softmax; the weights, which know no classes, stay."""
        return VRFClassifier(self.zero_shot.restrict(classes), self.fine_tuned.restrict(classes), self.vrf)


def _choices(value: Any, name: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not values or not all(isinstance(v, Real) and math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be a finite number, several of them, or None, got {value!r}")
    return tuple(map(float, values))
