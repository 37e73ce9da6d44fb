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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustft.data.sources import batches
from robustft.ensembles.output_ensemble import both_outputs
from robustft.ensembles.wise_ft import check_classes
from robustft.predictors.base import Predictor

_NORM_TOLERANCE = 0.02  # unit vectors that were rounded to half precision


@dataclass(frozen=True)
class VRFFeatures:
    """Unit fine-tuned features (N, D), zero-shot and fine-tuned logits (N, K), and labels (N,) where they are known.

    Made from two predictors by `of`; or from what is cached already, such as two `robustft.clip.Features` of the
    same data in the same order: `VRFFeatures(ft.image_features, zs.logits, ft.logits, ft.labels)`. For a linear probe
    both logits come from the same features.

    ValueError or TypeError for shapes that do not match, one class only, logits that are not finite, features that
    have no unit norm, and labels out of range.
    """

    features: Tensor
    zero_shot_logits: Tensor
    fine_tuned_logits: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        u, zs, ft = self.features, self.zero_shot_logits, self.fine_tuned_logits
        shapes = f"features {tuple(u.shape)}, zero_shot_logits {tuple(zs.shape)}, fine_tuned_logits {tuple(ft.shape)}"
        if u.ndim != 2 or zs.ndim != 2 or zs.shape != ft.shape or len(u) != len(zs):
            raise ValueError(f"expected features (N, D) and two logits (N, K) of the same samples, got {shapes}")
        if zs.shape[1] < 2:
            raise ValueError(f"with one class every probability is 1; expected at least 2 classes, got {shapes}")
        if not (u.is_floating_point() and zs.is_floating_point() and ft.is_floating_point()):
            raise TypeError(f"features and logits must be floating point, got {u.dtype}, {zs.dtype} and {ft.dtype}")
        if not (bool(zs.isfinite().all()) and bool(ft.isfinite().all())):
            raise ValueError("zero_shot_logits and fine_tuned_logits must be finite, but hold NaN or infinity")
        norms = torch.linalg.vector_norm(u, dim=1, dtype=torch.promote_types(u.dtype, torch.float32))
        if len(u) and not bool(((norms - 1.0).abs() <= _NORM_TOLERANCE).all()):
            raise ValueError(
                f"features must have unit norm, got norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}: "
                "pass torch.nn.functional.normalize(features, dim=-1)"
            )
        if self.labels is not None:
            if self.labels.shape != u.shape[:1] or self.labels.is_floating_point():
                raise ValueError(
                    f"labels must be integers ({len(u)},), got {self.labels.dtype} {tuple(self.labels.shape)}"
                )
            if len(u) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < zs.shape[1]:
                raise ValueError(f"labels must lie in [0, {zs.shape[1]}), as many as the logits' columns")

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    @torch.no_grad()
    def of(cls, zero_shot: Predictor, fine_tuned: Predictor, data: Any, batch_size: int = 256) -> VRFFeatures:
        """Both predictors' outputs on a whole set, on the CPU; data as for `robustft.data.sources`.

        Use the evaluation transform, also on training data. Memory: N (D + 2 K) floats.
        """
        check_classes(zero_shot, fine_tuned)
        device = next(fine_tuned.parameters()).device
        parts = []
        for images, labels in batches(data, fine_tuned, batch_size=batch_size):
            zs, ft = both_outputs(zero_shot, fine_tuned, images.to(device))
            parts.append((ft.features.cpu(), zs.logits.cpu(), ft.logits.cpu(), labels.cpu()))
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def rows(self, size: int) -> Iterator[VRFFeatures]:
        """The same samples in order, `size` at a time."""
        parts = (self.features, self.zero_shot_logits, self.fine_tuned_logits)
        for start in range(0, len(self), size):
            labels = None if self.labels is None else self.labels[start : start + size]
            yield VRFFeatures(*(part[start : start + size] for part in parts), labels)

    def correct(self) -> tuple[Tensor, Tensor]:
        """Where the zero-shot and where the fine-tuned classifier is right, (N,) each. ValueError without labels."""
        if self.labels is None:
            raise ValueError("labels are needed here: VRFFeatures was made without them")
        zs, ft = self.zero_shot_logits.argmax(-1), self.fine_tuned_logits.argmax(-1)
        return zs == self.labels, ft == self.labels

    def failures(self) -> Tensor:
        """Where the zero-shot classifier is wrong and the fine-tuned one right, (N,)."""
        zero_shot, fine_tuned = self.correct()
        return fine_tuned & ~zero_shot


class RatioBin(NamedTuple):
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
