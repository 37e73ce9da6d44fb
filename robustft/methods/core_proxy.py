"""DRM's proxy: how much of each training image's label its core features alone explain.

    c_ik = cos(u0_i, v0_k)                    frozen zero-shot model, v0 (K, D) of the classes' concept descriptions
    a_i  = (c_iy - low_y) / (high_y - low_y)  y = y_i; low and high over the training images of class y:  "affinity"
    r_ik = softmax_k(n_ik / tau)              n_ik = c_ik, from 0 to 1 over all training images:          "soft"

    "affinity"   q_i = a_i on y_i, and on class k of the others (1 - a_i) r_ik / sum_{k != y} r_ik, or nothing
    "soft"       q_i = r_i
    then         q_i <- (1 - m) q_i + m onehot(y_i),   m = 1/2

A description speaks of shape and parts, hardly of the ground that an object stands on, so c_iy is low for an image
that its class owes to its background. Similarities of different classes have different offsets and spreads: hence the
ranges, class by class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft import clip
from robustft.clip import features
from robustft.clip.outputs import evaluating
from robustft.clip.prompts import match_descriptions, split_names
from robustft.data.classes import matching_of
from robustft.data.sources import check_labels
from robustft.ops.kinds import check_fields, checked


class Ranges(NamedTuple):
    """Lowest and highest similarity to each class's descriptions (2, K): over its own images, over all images."""

    own: Tensor
    all: Tensor


@dataclass(frozen=True)
class CoreProxy:
    """Which proxy, as in the formulas above; `core_labels` computes it for a data set, `DRM` batch by batch.

    The paper's training code was never released, and how exactly it normalises affinities is not known: the forms are
    offered by name. The defaults are robustft's own choice, made on GlyphWorld (docs/drm.md): mass that is dropped
    rather than spread only weighs the images, which changed little there, and with half of it on the label no image
    is taught that it is of another class.

    Args:
        kind: "affinity" or "soft".
        temperature: tau, of normalised similarities: they lie in [0, 1].
        one_hot: m, the share of the label itself; 1 makes the worst-case risk plain cross-entropy.
        spread: of "affinity": spread the remaining mass over the other classes, or drop it.

    Raises ValueError naming what is out of range.
    """

    kind: Literal["affinity", "soft"] = "affinity"
    temperature: float = 0.1
    one_hot: float = 0.5
    spread: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in ("affinity", "soft"):
            raise ValueError(f'kind must be "affinity" or "soft", got {self.kind!r}')
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0.0 <= self.one_hot <= 1.0:
            raise ValueError(f"one_hot must lie in [0, 1], got {self.one_hot}")

    def __call__(self, similarities: Tensor, labels: Tensor, ranges: Ranges) -> Tensor:
        """q of similarities (N, K) and labels (N,): (N,) confidences of the label, or (N, K) soft labels.

        Images beyond the ranges, such as augmented ones, count as at their ends. A class whose images are all alike,
        or that had none, has affinity 1.
        """
        if self.kind == "affinity":
            own = similarities.gather(1, labels[:, None])[:, 0]
            affinity = _within(own, *(bound[labels] for bound in ranges.own))
            if not self.spread:
                return torch.lerp(affinity, torch.ones_like(affinity), self.one_hot)
        logits = _within(similarities, *ranges.all) / self.temperature
        target = F.one_hot(labels, similarities.shape[1]).to(logits)
        if self.kind == "affinity":
            rest = logits.masked_fill(target.bool(), -torch.inf).softmax(1)
            soft = torch.lerp(rest, target, affinity[:, None])
        else:
            soft = logits.softmax(1)
        return torch.lerp(soft, target, self.one_hot)

    @staticmethod
    def ranges(similarities: Tensor, labels: Tensor) -> Ranges:
        """The ranges of a training set's similarities (N, K) to the descriptions; labels (N,)."""
        own = similarities.gather(1, labels[:, None])[:, 0]
        empty = similarities.new_zeros(similarities.shape[1])  # stays 0 to 0 for a class without images
        bounds = [empty.scatter_reduce(0, labels, own, way, include_self=False) for way in ("amin", "amax")]
        return Ranges(torch.stack(bounds), torch.stack(similarities.aminmax(dim=0)))


@checked
def core_labels(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any,
    class_names: Sequence[str] | Mapping[str, str],
    descriptions: Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str]],
    proxy: CoreProxy = CoreProxy(),
    cache: str | Path | None = None,
    batch_size: int = 256,
) -> Tensor:
    """The proxy of every training image, once, by the zero-shot model: (N,) or (N, K) as `CoreProxy` says, float32.

    Give it to `DRM` with the batches, under "core", and DRM keeps no frozen model of its own.

    Args:
        model: the zero-shot model; used in evaluation mode.
        data: the training images, as for `robustft.clip.encode`, with the evaluation transform.
        tokenizer, class_names: as for `DRM`. descriptions: as for `DRM`.
        proxy: which one.
        cache, batch_size: of the image features, as for `robustft.clip.encode`; a second call with another
            proxy or other descriptions encodes no image.
    """
    classes, class_names = split_names(class_names)
    descriptions = match_descriptions(descriptions, class_names)
    with evaluating(model), torch.no_grad():
        embeddings = clip.caption_embeddings(model, tokenizer, descriptions, batch_size=batch_size, names=class_names)
    similarities, labels = core_similarities(model, data, embeddings, classes, cache=cache, batch_size=batch_size)
    return proxy(similarities, labels, CoreProxy.ranges(similarities, labels))


def core_similarities(
    model: nn.Module,
    data: Any,
    core_embeddings: Tensor,
    classes: Sequence[str],
    *,
    cache: str | Path | None,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Cosines (N, K) of a data set's images to unit embeddings (K, D), in float32, and its labels (N,); on the CPU.

    Labels are matched to the K classes by name, where the data set tells names."""
    matching = matching_of(data, classes)
    encoded = features.encode(model, data, batch_size=batch_size, cache=cache)
    labels = encoded.labels if matching is None else matching.of(encoded.labels)
    check_labels(labels, len(core_embeddings))
    return encoded.image_features @ core_embeddings.detach().cpu().float().T, labels


def _within(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where in [low, high] a value lies, from 0 to 1; 1 where the range is a point."""
    width = high - low
    return torch.where(width > 0, (value - low) / torch.where(width > 0, width, 1.0), 1.0).clamp(0.0, 1.0)
