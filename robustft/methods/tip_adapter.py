"""Tip-Adapter (Zhang et al., ECCV 2022, arXiv 2207.09519): a cache of few-shot features beside the zero-shot head.

    F (M, D)   unit features of the M training images, the keys;   Y (M, K) their labels, one-hot, the values
    w (K, D)   class embeddings of hand-written prompts
    z (N, K) = s u w^T + alpha exp(-beta (1 - u F^T)) Y

`TipAdapter` computes that and trains nothing. `TipAdapterF` starts there and trains F. Both choose alpha and beta on a
validation set by accuracy; the released code does so, and picks the epoch, on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.features import Features
from robustft.clip.outputs import Outputs
from robustft.data.classes import matching_of
from robustft.data.sources import check_labels
from robustft.methods.base import Step
from robustft.methods.frozen import FrozenModel, FrozenOptions
from robustft.methods.options import check_weights
from robustft.ops.kinds import checked
from robustft.predictors.base import Classifier, FeaturePredictor
from robustft.predictors.logits import accuracy_and_nll, preference

ALPHA, BETA = 1.17, 1.0  # the released configuration of most data sets
ALPHAS = BETAS = tuple(i / 5 for i in range(1, 51))  # the widest of the released ranges, up to 10


class TipAdapter:
    """The training-free cache classifier.

    Learnt by `fit`: `keys_` (M, D), `labels_` (M,), `alpha_` and `beta_`, and with a validation set `accuracies_` and
    `nlls_` (alphas x betas) on it. Features may be averaged over augmented views before they are passed, as the
    released code does over ten; the keys are normalised again. Memory: N M floats for N images.

    Args:
        zero_shot: a classifier without bias, whose model and head stay as they are.
        alpha, beta: used when `fit` gets no validation set.

    Source: Zhang et al., Tip-Adapter (ECCV 2022, arXiv 2207.09519), and its released code.
    """

    zero_shot: Classifier
    alpha: float
    beta: float

    @checked
    def __init__(self, zero_shot: Classifier, *, alpha: float = ALPHA, beta: float = BETA) -> None:
        if zero_shot.bias is not None:
            raise ValueError("zero_shot has a bias; a cache goes with a head of class embeddings alone")
        check_weights(alpha=alpha, beta=beta)
        self.zero_shot = zero_shot
        self.alpha, self.beta = alpha, beta

    @checked
    def fit(
        self,
        train: Features | Any,
        validation: Features | Any | None = None,
        *,
        alphas: Sequence[float] = ALPHAS,
        betas: Sequence[float] = BETAS,
    ) -> TipAdapter:
        """Fill the cache with `train`, then choose alpha_ and beta_ by accuracy on `validation`, then by NLL.

        Both are `Features` of the zero-shot model or data as for `robustft.data.sources`, whose labels are matched to
        the classes by name where it tells names. On a validation set with some of the classes, only these are compared.
        """
        keys, labels = _features(self.zero_shot, train)
        self.keys_, self.labels_ = F.normalize(keys, dim=-1), labels
        self.alpha_, self.beta_ = self.alpha, self.beta
        if validation is not None:
            search = search_shape(self.classifier(), validation, alphas, betas)
            self.alpha_, self.beta_, self.accuracies_, self.nlls_ = search
        return self

    def classifier(self) -> CacheClassifier:
        """The predictor at the chosen alpha_ and beta_."""
        if not hasattr(self, "keys_"):
            raise ValueError("TipAdapter has no cache yet: call fit(train, validation)")
        zs = self.zero_shot
        return CacheClassifier(
            zs.model,
            zs.classes,
            class_embeddings=zs.class_embeddings,
            logit_scale=zs.logit_scale,
            keys=self.keys_,
            labels=self.labels_,
            alpha=self.alpha_,
            beta=self.beta_,
        )


class TipAdapterF(FrozenModel):
    """The cache whose keys are trained; they start as the features of `train` and are not normalised again.

    The released recipe is AdamW at 1e-3 with cosine decay, batches of 256, 20 epochs.

    Args:
        train: what fills the cache, `Features` of the model or data as for `robustft.clip.batches`.
        alpha, beta: during training; `select` chooses them anew afterwards.
        others: as for `FrozenModel`; nothing here is random.

    Source: Zhang et al., Tip-Adapter (ECCV 2022, arXiv 2207.09519), and its released code.
    """

    takes_features = True
    uncompared = ("train",)  # the state has the cache
    class_embeddings: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        train: Features | Any,
        alpha: float = ALPHA,
        beta: float = BETA,
        **options: Unpack[FrozenOptions],
    ) -> None:
        check_weights(alpha=alpha, beta=beta)
        super().__init__(model, **options)
        head = self.zero_shot_classifier()
        keys, labels = _features(head, train)
        self.register_buffer("class_embeddings", head.class_embeddings, persistent=False)
        self.register_buffer("labels", labels.to(head.class_embeddings.device))
        self.keys = nn.Parameter(F.normalize(keys, dim=-1).to(head.class_embeddings))
        # Buffers, so that a checkpoint holds what `select` chose.
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        u = self.image_features(images)
        with torch.autocast(u.device.type, enabled=False):
            z = clip.logit_scale(self.model) * (u @ self.class_embeddings.to(u.dtype).T)
            cache = cache_logits(u, self.keys, self.labels, len(self.class_names), float(self.beta))
        return Step(*self.objective.of_logits(z + float(self.alpha) * cache, labels, zero_shot_logits=z))

    @checked
    def select(
        self, validation: Features | Any, *, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS
    ) -> TipAdapterF:
        """Choose alpha and beta on `validation`, as `TipAdapter.fit` does, for the keys as they are."""
        search = search_shape(self.classifier(), validation, alphas, betas)
        self.alpha.fill_(search.alpha)
        self.beta.fill_(search.beta)
        return self

    def classifier(self) -> CacheClassifier:
        """The cache learnt so far, on the frozen model."""
        return CacheClassifier(
            self.model,
            self.classes,
            class_embeddings=self.class_embeddings,
            logit_scale=clip.logit_scale(self.model),
            keys=self.keys,
            labels=self.labels,
            alpha=float(self.alpha),
            beta=float(self.beta),
        )


class CacheClassifier(FeaturePredictor):
    """What both adapters end in. Its `cosines` are the text head's; MSP, energy and entropy, of logits, see the cache.

    With the cache z / s is no cosine: it grows with alpha and the shots.
    """

    tensors = {"class_embeddings": "K D", "logit_scale": "", "keys": "M D", "labels": "M int"}
    settings = ("alpha", "beta")
    class_embeddings: Tensor
    logit_scale: Tensor
    keys: Tensor
    labels: Tensor

    @checked
    def __init__(
        self, model: nn.Module, classes: Sequence[str], *, alpha: float, beta: float, **tensors: Tensor
    ) -> None:
        super().__init__(model, classes, **tensors)
        check_weights(alpha=alpha, beta=beta)
        if len(self.labels):
            check_labels(self.labels, len(self.classes))
        self.alpha, self.beta = alpha, beta

    def head_outputs(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            cosines = features @ self.class_embeddings.to(features.dtype).T
        return Outputs(features, cosines, self.logits_of(features))

    def logits_of(self, u: Tensor) -> Tensor:
        """Logits (N, K) of unit features (N, D)."""
        with torch.autocast(u.device.type, enabled=False):
            cache = cache_logits(u, self.keys, self.labels, len(self.classes), self.beta)
            return self.text_logits(u) + self.alpha * cache

    def text_logits(self, u: Tensor) -> Tensor:
        """s u w^T (N, K), without the cache."""
        return self.logit_scale.to(u.dtype) * (u @ self.class_embeddings.to(u.dtype).T)

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> CacheClassifier:
        keep = self._indices(classes)
        new = torch.full((len(self.classes),), -1, device=self.labels.device)
        new[keep] = torch.arange(len(keep), device=new.device)
        labels = new[self.labels]
        return self._with(
            self.classes.at(keep),
            class_embeddings=self.class_embeddings[keep],
            keys=self.keys[labels >= 0],
            labels=labels[labels >= 0],
        )


def cache_logits(u: Tensor, keys: Tensor, labels: Tensor, classes: int, beta: float) -> Tensor:
    """exp(-beta (1 - u F^T)) Y, (N, K), of unit features (N, D), keys (M, D) and their labels (M,)."""
    values = F.one_hot(labels, classes).to(u.dtype)
    return (beta * (u @ keys.to(u.dtype).T - 1)).exp() @ values


class Search(NamedTuple):
    """The chosen alpha and beta, and accuracies and NLLs of all, alphas x betas."""

    alpha: float
    beta: float
    accuracies: tuple[tuple[float, ...], ...]
    nlls: tuple[tuple[float, ...], ...]


@torch.no_grad()
def search_shape(
    classifier: CacheClassifier, validation: Features | Any, alphas: Sequence[float], betas: Sequence[float]
) -> Search:
    """The alpha and beta of highest accuracy on `validation`; of equals the ones of lower NLL, then the first."""
    if not len(alphas) or not len(betas):
        raise ValueError(f"alphas and betas must not be empty, got {len(alphas)} and {len(betas)}")
    for alpha, beta in [*((alpha, BETA) for alpha in alphas), *((ALPHA, beta) for beta in betas)]:
        check_weights(alpha=alpha, beta=beta)
    matching = matching_of(validation, classifier.classes, of="the predictor")
    if matching is not None and matching.partial:
        classifier = classifier.restrict(matching.kept)
    u, labels = _features(classifier, validation)
    u, labels = u.to(classifier.keys.device), labels.to(classifier.keys.device)
    text = classifier.text_logits(u)
    columns = []
    for beta in betas:
        cache = cache_logits(u, classifier.keys, classifier.labels, len(classifier.classes), beta)
        columns.append([accuracy_and_nll(text + alpha * cache, labels) for alpha in alphas])
    rows = tuple(zip(*columns, strict=True))
    a, b = min(
        ((a, b) for a in range(len(alphas)) for b in range(len(betas))),
        key=lambda place: preference(*rows[place[0]][place[1]]),
    )
    accuracies, nlls = (tuple(tuple(cell[i] for cell in row) for row in rows) for i in (0, 1))
    return Search(alphas[a], betas[b], accuracies, nlls)


def _features(classifier: Classifier | CacheClassifier, data: Features | Any) -> tuple[Tensor, Tensor]:
    """Unit features (M, D) and labels (M,) among the classifier's classes, given or encoded by its model."""
    matching = matching_of(data, classifier.classes, of="the predictor")
    if not isinstance(data, Features):
        outputs = classifier.predict(data)
        labels = outputs.labels if matching is None else torch.tensor(matching.kept)[outputs.labels]
        data = Features(outputs.features, labels)
    elif matching is not None:
        data = Features(data.image_features, matching.of(data.labels))
    width = classifier.class_embeddings.shape[1]
    if data.image_features.ndim != 2 or data.image_features.shape[1] != width:
        raise ValueError(f"features must be (M, {width}), as the model's, got {tuple(data.image_features.shape)}")
    check_labels(data.labels, len(classifier.classes))
    return data.image_features, data.labels.long()
