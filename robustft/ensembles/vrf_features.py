"""What VRF looks at: two models' outputs on one set, and how their accuracies compare along a distance.

u (N, D)      unit features of the fine-tuned encoder, evaluation transform
z_zs, z_ft    logits (N, K) of the zero-shot and of the fine-tuned classifier
y (N,)        labels

failures      zero-shot wrong, fine-tuned right:   argmax z_zs != y  and  argmax z_ft = y
ratio(bin)    acc_ft(bin) / acc_zs(bin)            over bins of equally many samples, by distance
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from robustft.clip.outputs import Outputs
from robustft.ensembles.wise_ft import check_members
from robustft.ops.kinds import check_fields, checked
from robustft.predictors.base import Predictor, each_batch

_NORM_TOLERANCE = 0.02  # unit vectors that were rounded to half precision


@dataclass(frozen=True)
class VRFFeatures:
    """What two predictors make of one set: of the zero-shot one the logits (N, K), of the fine-tuned one its unit
    features (N, D) and logits (N, K), and labels (N,) where they are known.

    Made from two predictors by `of`; or from what is cached already, such as two `robustft.clip.Features` of the
    same data in the same order:
    `VRFFeatures(Outputs(logits=zs), Outputs(ft.image_features, logits=ft.logits, labels=ft.labels))`. For a linear
    probe both logits come from the same features.

    ValueError or TypeError for shapes that do not match, one class only, logits that are not finite, features that
    have no unit norm, and labels out of range.
    """

    zero_shot: Outputs
    fine_tuned: Outputs

    def __post_init__(self) -> None:
        check_fields(self)
        u, zs, ft = self.fine_tuned.features, self.zero_shot.logits, self.fine_tuned.logits
        shapes = f"features {tuple(u.shape)}, zero-shot logits {tuple(zs.shape)}, fine-tuned logits {tuple(ft.shape)}"
        if u.ndim != 2 or zs.ndim != 2 or zs.shape != ft.shape or len(u) != len(zs):
            raise ValueError(f"expected features (N, D) and two logits (N, K) of the same samples, got {shapes}")
        names = self.zero_shot.classes, self.fine_tuned.classes
        if None not in names and names[0] != names[1]:
            raise ValueError(
                f"zero_shot and fine_tuned have other classes, or another order of them: {names[0]} and {names[1]}"
            )
        if zs.shape[1] < 2:
            raise ValueError(f"with one class every probability is 1; expected at least 2 classes, got {shapes}")
        if not (u.is_floating_point() and zs.is_floating_point() and ft.is_floating_point()):
            raise TypeError(f"features and logits must be floating point, got {u.dtype}, {zs.dtype} and {ft.dtype}")
        if not (bool(zs.isfinite().all()) and bool(ft.isfinite().all())):
            raise ValueError("zero-shot and fine-tuned logits must be finite, but hold NaN or infinity")
        norms = torch.linalg.vector_norm(u, dim=1, dtype=torch.promote_types(u.dtype, torch.float32))
        if len(u) and not bool(((norms - 1.0).abs() <= _NORM_TOLERANCE).all()):
            raise ValueError(
                f"features must have unit norm, got norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}: "
                "pass torch.nn.functional.normalize(features, dim=-1)"
            )
        if self.fine_tuned.has("labels"):
            labels = self.fine_tuned.labels
            if labels.shape != u.shape[:1] or labels.is_floating_point():
                raise ValueError(f"labels must be integers ({len(u)},), got {labels.dtype} {tuple(labels.shape)}")
            if len(u) and not 0 <= int(labels.min()) <= int(labels.max()) < zs.shape[1]:
                raise ValueError(f"labels must lie in [0, {zs.shape[1]}), as many as the logits' columns")

    def __len__(self) -> int:
        return len(self.fine_tuned.features)

    @classmethod
    @checked
    def of(cls, zero_shot: Predictor, fine_tuned: Predictor, data: Any, batch_size: int = 256) -> VRFFeatures:
        """Both predictors' outputs on a whole set, on the CPU; data as for `robustft.data.sources`.

        Use the evaluation transform, also on training data. Memory: N (D + 2 K) floats.
        """
        check_members(zero_shot, fine_tuned)
        parts = [
            (zs.only("logits"), ft.only("features", "logits", "labels"))
            for zs, ft in each_batch((zero_shot, fine_tuned), data, batch_size)
        ]
        zs, ft = (Outputs.cat(column) for column in zip(*parts, strict=True))
        return cls(zs, ft)

    @property
    def features(self) -> Tensor:
        """u (N, D), of the fine-tuned encoder."""
        return self.fine_tuned.features

    @property
    def labels(self) -> Tensor:
        """Labels (N,); ValueError where they are not known."""
        return self.fine_tuned.labels

    def rows(self, size: int) -> Iterator[VRFFeatures]:
        """The same samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            take = itemgetter(slice(start, start + size))
            yield VRFFeatures(self.zero_shot.map(take), self.fine_tuned.map(take))

    def correct(self) -> tuple[Tensor, Tensor]:
        """Where the zero-shot and where the fine-tuned classifier is right, (N,) each. ValueError without labels."""
        zs, ft = self.zero_shot.logits.argmax(-1), self.fine_tuned.logits.argmax(-1)
        return zs == self.labels, ft == self.labels

    def failures(self) -> Tensor:
        """Where the zero-shot classifier is wrong and the fine-tuned one right, (N,)."""
        zero_shot, fine_tuned = self.correct()
        return fine_tuned & ~zero_shot


@dataclass(frozen=True)
class RatioBin:
    """Samples at distances from `lower` to `upper`: both accuracies, and the mean weight of the fine-tuned model."""

    lower: float
    upper: float
    count: int
    zero_shot_accuracy: float
    fine_tuned_accuracy: float
    weight: float

    @property
    def ratio(self) -> float:
        """acc_ft / acc_zs: infinite where only the zero-shot model is always wrong, NaN where both are."""
        if self.zero_shot_accuracy > 0.0:
            return self.fine_tuned_accuracy / self.zero_shot_accuracy
        return math.inf if self.fine_tuned_accuracy > 0.0 else math.nan


def ratio_bins(data: VRFFeatures, distances: Tensor, weights: Tensor, bins: int) -> tuple[RatioBin, ...]:
    """Accuracies of both models in `bins` bins of equally many samples, nearest first."""
    if not 1 <= bins <= len(data):
        raise ValueError(f"bins must lie in [1, {len(data)}], the number of samples, got {bins}")
    zero_shot, fine_tuned = data.correct()
    order = distances.argsort(stable=True)
    columns = [c.double()[order].tensor_split(bins) for c in (distances, zero_shot, fine_tuned, weights)]
    return tuple(
        RatioBin(float(d[0]), float(d[-1]), len(d), float(zs.mean()), float(ft.mean()), float(w.mean()))
        for d, zs, ft, w in zip(*columns, strict=True)
    )
