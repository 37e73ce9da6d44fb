"""Fine-tuning that keeps what the pre-trained model says of an image over a set of texts.

    u, u0 (N, D)     image features, tuned and pre-trained
    t     (M, D)     features of the texts, by the pre-trained text tower; which texts, a method says
    z = s u t^T,  z0 = s u0 t^T     (N, M) logits of the texts, s the pre-trained scale

L = objective + lambda (1/N) sum_i D(z_i, z0_i)

squared   D = 1/(2M) sum_m (z_m - z0_m)^2                          Lipsum-FT (lipsum_ft.py)
kl        D = sum_m p0_m log(p0_m / p_m),  p = softmax(z)          CAR-FT (car_ft.py), and StarFT (starft.py), where
                                                                   t and t0 differ, for the text tower is trained
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.outputs import similarities
from robustft.clip.prompts import Template, captions
from robustft.methods.base import Step
from robustft.methods.fine_tune import FineTune, FineTuneOptions
from robustft.methods.options import check_weights
from robustft.methods.unsaved import Pretrained


class TextAnchored(FineTune):
    """`FineTune`, and a divergence from the pre-trained model over texts; a subclass says which, and which texts.

    The pre-trained model is kept, frozen, and encodes each batch too, without a gradient: one more model in memory and
    one more forward pass. It is no part of `state_dict()`. The gradient of the divergence reaches the image tower.

    Args:
        weight: lambda. At 0 nothing is kept and computed, and this is `FineTune`.
        others: as for `FineTune`. The divergence is one of samples, so that a batch's is the mean of its parts'.
    """

    term: ClassVar[str]  # what the divergence is called among the terms

    def __init__(self, model: nn.Module, *, weight: float, **options: Unpack[FineTuneOptions]) -> None:
        check_weights(weight=weight)
        super().__init__(model, **options)
        self.weight = weight
        self.pretrained = Pretrained(self) if weight else None
        self.config |= self.pretrained.config if self.pretrained else {}

    def texts(self, pretrained: Pretrained) -> Tensor:
        """t (M, D), unit rows, for the step that is next."""
        raise NotImplementedError

    def divergence(self, z: Tensor, z0: Tensor) -> Tensor:
        """D (N,) of logits (N, M), those trained and those pre-trained."""
        raise NotImplementedError

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        u = clip.encode_images(self.model, images)
        out = self.head_step(u, labels, self.reference(images))
        if self.pretrained is not None:
            t, u0, s = self.texts(self.pretrained), self.pretrained.image_features(images), self.pretrained.logit_scale
            z, z0 = (similarities(features, t.to(u.dtype), s)[1] for features in (u, u0))
            divergence = self.divergence(z, z0).mean()
            out = Step(out.loss + self.weight * divergence, {**out.terms, self.term: divergence.detach()})
        return out if self.l2_sp is None else self.l2_sp.added(out, self)


def captions_of(name: str, templates: Sequence[Template], class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """`prompts.captions` of the option `name`, which its errors name."""
    try:
        return captions(class_names, templates)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def squared(z: Tensor, z0: Tensor) -> Tensor:
    """Half the mean squared difference of logits (N, M), (N,)."""
    return (z - z0).square().mean(1) / 2


def kl(z: Tensor, z0: Tensor) -> Tensor:
    """KL(softmax(z0) || softmax(z)) of logits (N, M), (N,)."""
    log_p, log_p0 = z.log_softmax(1), z0.log_softmax(1)
    return (log_p0.exp() * (log_p0 - log_p)).sum(1)
