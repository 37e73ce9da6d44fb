"""Scores by name: what each reads of an image, its options, and what it learns from ID images first.

`Evidence` holds what there is to read, `SCORES` the names, `register` adds one's own. The mathematics is in
`robustft.detection.scores`; `robustft.Detector` puts a threshold on a score.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.detection import scores as ood_scores
from robustft.neighbors import NeighborIndex


class Evidence(NamedTuple):
    """What scores read of N images; None where it is not at hand."""

    features: Tensor | None = None  # (N, D), unit
    cosines: Tensor | None = None  # (N, K)
    logits: Tensor | None = None  # (N, K)
    patch_cosines: Tensor | None = None  # (N, P, K)
    labels: Tensor | None = None  # (N,), of ID training images


def evidence(
    features: Tensor,
    class_embeddings: Tensor,
    logit_scale: Tensor | float | None = None,
    *,
    patch_features: Tensor | None = None,
    labels: Tensor | None = None,
) -> Evidence:
    """The evidence in unit features (N, D), and patch features (N, P, D), under a head (K, D).

    The head's rows are normalised for the cosines and taken as they are for the logits, which need `logit_scale`.
    """
    head = class_embeddings.to(features.dtype)
    unit = F.normalize(head, dim=-1).T
    return Evidence(
        features,
        features @ unit,
        None if logit_scale is None else logit_scale * (features @ head.T),
        None if patch_features is None else patch_features @ unit,
        labels,
    )


class Score:
    """How evidence is scored. `reads` names its fields, `options` are numbers; `learns` says that `fit` is needed.

    A subclass that learns keeps what it learnt in `state()`, tensors by name, and takes it back in `restore`.
    """

    reads: tuple[str, ...] = ("features",)
    learns: bool = False

    def __init__(self, **options: Any) -> None:
        self.options = options

    def fit(self, train: Evidence) -> None:
        """Learns from ID training images."""

    def __call__(self, evidence: Evidence) -> Tensor:
        """Scores (N,), higher = more in-distribution."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""


class Pointwise(Score):
    """A function of the fields it reads, in their order, with options by keyword."""

    def __init__(self, function: Callable[..., Tensor], reads: tuple[str, ...], **options: Any) -> None:
        known = list(inspect.signature(function).parameters)[len(reads) :]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"{function.__name__} has no option {unknown[0]!r}; it has {known or 'none'}")
        super().__init__(**options)
        self.function = function
        self.reads = reads

    def __call__(self, evidence: Evidence) -> Tensor:
        return self.function(*(getattr(evidence, name) for name in self.reads), **self.options)


class NegLabel(Score):
    """`ood_scores.neg_label` against texts of embeddings (M, D), unit rows, by the model's own text tower."""

    reads = ("features", "cosines")

    def __init__(self, negative_embeddings: Tensor | None = None, **options: Any) -> None:
        super().__init__(**Pointwise(ood_scores.neg_label, ("cosines", "negative_cosines"), **options).options)
        if negative_embeddings is not None:
            negative_embeddings = negative_embeddings.detach().cpu().contiguous().clone()
        self.negative_embeddings = negative_embeddings

    def __call__(self, evidence: Evidence) -> Tensor:
        if self.negative_embeddings is None:
            raise ValueError(
                "score 'neg_label' has no negative texts: pass negative_embeddings (M, D), for example "
                "clip.encode_texts of words chosen by ood_scores.select_negatives"
            )
        negatives = self.negative_embeddings.to(evidence.features)
        if negatives.ndim != 2 or negatives.shape[1] != evidence.features.shape[1]:
            raise ValueError(
                f"negative_embeddings must be (M, {evidence.features.shape[1]}) as the features, "
                f"got {tuple(negatives.shape)}"
            )
        return ood_scores.neg_label(evidence.cosines, evidence.features @ negatives.T, **self.options)

    def state(self) -> dict[str, Tensor]:
        return {} if self.negative_embeddings is None else {"negative_embeddings": self.negative_embeddings}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.negative_embeddings = state.get("negative_embeddings")


class Mahalanobis(Score):
    """`ood_scores.mahalanobis` to the class Gaussians of ID training features; `shrinkage` as in their fit."""

    learns = True

    def __init__(self, shrinkage: float | None = None) -> None:
        super().__init__(shrinkage=shrinkage)

    def fit(self, train: Evidence) -> None:
        if train.labels is None:
            raise ValueError("score 'mahalanobis' needs the labels of the training images")
        self.gaussians = ood_scores.fit_class_gaussians(train.features, train.labels, self.options["shrinkage"])

    def __call__(self, evidence: Evidence) -> Tensor:
        return ood_scores.mahalanobis(evidence.features, self.gaussians)

    def state(self) -> dict[str, Tensor]:
        shrinkage = torch.tensor(self.gaussians.shrinkage, dtype=torch.float64)
        return self.gaussians._asdict() | {"shrinkage": shrinkage}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.gaussians = ood_scores.ClassGaussians(**state | {"shrinkage": float(state["shrinkage"])})


class KNN(Score):
    """`ood_scores.knn_distance` to ID training features; `k` None is a thousandth of them, at least 1."""

    learns = True

    def __init__(self, k: int | None = None) -> None:
        super().__init__(k=k)

    def fit(self, train: Evidence) -> None:
        self.index = NeighborIndex(train.features.detach())

    def __call__(self, evidence: Evidence) -> Tensor:
        k = max(1, len(self.index) // 1000) if self.options["k"] is None else self.options["k"]
        return ood_scores.knn_distance(evidence.features, self.index, k)

    def state(self) -> dict[str, Tensor]:
        return {"points": self.index.points}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.index = NeighborIndex(state["points"])


def _pointwise(function: Callable[..., Tensor], *reads: str) -> Callable[..., Score]:
    return functools.partial(Pointwise, function, reads)


SCORES: dict[str, Callable[..., Score]] = {
    "mcm": _pointwise(ood_scores.mcm, "cosines"),
    "max_cosine": _pointwise(ood_scores.max_cosine, "cosines"),
    "variance": _pointwise(ood_scores.variance, "cosines"),
    "msp": _pointwise(ood_scores.msp, "logits"),
    "energy": _pointwise(ood_scores.energy, "logits"),
    "entropy": _pointwise(ood_scores.entropy, "logits"),
    "l_mcm": _pointwise(ood_scores.local_mcm, "patch_cosines"),
    "gl_mcm": _pointwise(ood_scores.gl_mcm, "cosines", "patch_cosines"),
    "neg_label": NegLabel,
    "mahalanobis": Mahalanobis,
    "knn": KNN,
}
"""Scores by name: each makes a `Score` from its options. A subclass of `Score` is added as it is."""

_OWN = frozenset(SCORES)


def register(name: str, function: Callable[..., Tensor], reads: tuple[str, ...]) -> None:
    """Makes `Detector(name, **options)` score by `function(*fields, **options) -> (N,)`, fields of `Evidence`.

    Higher has to mean more in-distribution. A detector that was saved needs its score registered before it is loaded.
    """
    if unknown := [field for field in reads if field not in Evidence._fields]:
        raise ValueError(f"reads must name fields of Evidence, {Evidence._fields}, got {unknown}")
    if name in _OWN:
        raise ValueError(f"name must not be that of one of robustft's own scores, {sorted(_OWN)}, got {name!r}")
    SCORES[name] = _pointwise(function, *reads)
