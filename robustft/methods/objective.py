"""What a class head is trained with: cross-entropy, and terms that keep its confidence honest.

    L = CE(z, y; e) + lambda M(z, y) + sum_k weight_k term_k(z, y, z0)

    z (N, K) logits, y (N,) labels, e the label smoothing; the focal loss may take the place of CE
    z0        (N, K) the zero-shot model's logits of the same images, for `ZERO_SHOT_TERMS` and `rescale` alone
    M         the misalignment penalty of CMP (arXiv 2501.17595), `functional.misalignment_penalty`
    term_k    others by name, from `TERMS` and `ZERO_SHOT_TERMS`; their mathematics is in `calibration_losses`

Every method with class logits (FineTune, LinearProbe, the prompt learners, the adapters) takes one, so that each term
meets each host, which has z0 ready where a term asks for it (`zero_shot_reference.ZeroShotReference`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.calibration import losses as calibration_losses
from robustft.functional import misalignment_penalty
from robustft.losses import ClassificationLoss, weighted_sum
from robustft.ops import arguments
from robustft.ops.precision import at_least_float32

Term = Callable[[Tensor, Tensor], Tensor]
ZeroShotTerm = Callable[[Tensor, Tensor, Tensor], Tensor]

TERMS: dict[str, Term] = {
    "brier": calibration_losses.brier_loss,
    "dca": calibration_losses.dca_loss,
    "mdca": calibration_losses.mdca_loss,
    "mmce": calibration_losses.mmce_loss,
    "mbls": calibration_losses.margin_penalty,
    "confidence_penalty": calibration_losses.confidence_penalty,
}
"""Terms of logits (N, K) and labels (N,), each a 0-d mean over the batch, at their defaults.

Another setting, or a term of one's own, is another name:
`TERMS["mbls_6"] = functools.partial(calibration_losses.margin_penalty, margin=6.0)`.
"""


def _logit_range(logits: Tensor, labels: Tensor, zero_shot_logits: Tensor) -> Tensor:
    low, high = zero_shot_logits.aminmax(dim=1, keepdim=True)
    return calibration_losses.logit_range_penalty(logits, labels, low, high)


ZERO_SHOT_TERMS: dict[str, ZeroShotTerm] = {"logit_range": _logit_range}
"""Terms of logits (N, K), labels (N,) and the zero-shot model's logits (N, K), each a 0-d mean over the batch.

They are used by name as those of `TERMS` are, and may be added to as those; no name is in both.
"""


@dataclass(frozen=True)
class Objective:
    """Cross-entropy with a misalignment penalty and other terms; of weight 0, none of them is computed.

    Args:
        label_smoothing: e mixes the targets as (1 - e) one-hot + e / K.
        misalignment: lambda, the weight of the misalignment penalty; CMP's released command has 1.
        variant, top1: of the penalty, as in `functional.classification_loss`.
        terms: weights of further terms, by their name in `TERMS` or `ZERO_SHOT_TERMS`.
        focal: gamma of the focal loss, which then takes the cross-entropy's place (and its name among the terms is
            "focal"); 0 is cross-entropy. It does not go with label smoothing.
        rescale: "zero_shot" maps each row of logits onto the range of the zero-shot model's before anything else sees
            it, which with cross-entropy is ZS-Norm (Murugesan et al. 2024, arXiv 2407.13588). The classifier learnt
            keeps its logits as they are; `calibration_losses.rescale_to_range` maps them when they are used.

    "logit_range" and `rescale` compare with the zero-shot model as it was before training. For a host with a frozen
    image tower that costs one product (N, D) by (D, K); where the tower or its prompts are trained (FineTune, LPFT,
    MaPLe), one more pass of the images without a gradient, and for the first two a frozen copy of the model in memory.

    Raises ValueError naming what is out of range or unknown.
    """

    label_smoothing: float = 0.0
    misalignment: float = 0.0
    variant: str = "neg_log_ratio"
    top1: bool = False
    terms: Mapping[str, float] = field(default_factory=dict)
    focal: float = 0.0
    rescale: Literal["zero_shot"] | None = None

    def __post_init__(self) -> None:
        arguments.check_fields(self)
        arguments.check_smoothing(self.label_smoothing)
        arguments.check_variant(self.variant)
        if self.focal and self.label_smoothing:
            raise ValueError(f"focal is {self.focal}, label_smoothing {self.label_smoothing}: use one of them")
        if self.rescale not in (None, "zero_shot"):
            raise ValueError(f'rescale is {self.rescale!r}; expected "zero_shot" or None')
        known = {*TERMS, *ZERO_SHOT_TERMS}
        if unknown := [name for name in self.terms if name not in known]:
            raise ValueError(f"terms holds {unknown}; expected some of {sorted(known)}")
        for name, weight in {"focal": self.focal, "misalignment": self.misalignment, **self.terms}.items():
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight}; expected it finite and not negative")

    @property
    def needs_zero_shot(self) -> bool:
        """Whether the zero-shot model's logits are asked for."""
        return self.rescale is not None or any(w and name in ZERO_SHOT_TERMS for name, w in self.terms.items())

    @property
    def of_samples(self) -> bool:
        """Whether it is a loss of single samples, rather than of a batch as a whole."""
        return not (self.focal or self.rescale or any(self.terms.values()))

    def __call__(
        self,
        features: Tensor,
        class_embeddings: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        *,
        bias: Tensor | None = None,
        zero_shot_logits: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of features (N, D) under a head (K, D), and its terms, un-weighted and detached.

        Logits exist as a matrix (N, K) only if the focal loss, `rescale` or one of `terms` needs them.
        `zero_shot_logits` (N, K) as for `of_logits`. reduction: "none" gives losses (N,) of single samples, which only
        cross-entropy and the penalty have (`of_samples`).
        """
        if not self.of_samples:
            if reduction != "mean":
                raise ValueError(f"reduction is {reduction!r}: {self} has terms without losses of single samples")
            with torch.autocast(features.device.type, enabled=False):
                logits = logit_scale * (features @ class_embeddings.to(features.dtype).T)
            return self.of_logits(logits if bias is None else logits + bias, labels, zero_shot_logits)
        streamed = ClassificationLoss(
            misalignment_weight=self.misalignment,
            variant=self.variant,
            top1=self.top1,
            label_smoothing=self.label_smoothing,
        )
        head = (features, class_embeddings, logit_scale)
        return self._added(streamed.terms(*head, labels=labels, bias=bias, reduction=reduction))

    def of_logits(
        self, logits: Tensor, labels: Tensor, zero_shot_logits: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of logits (N, K) that exist already, for hosts whose head is no fixed matrix.

        zero_shot_logits: (N, K) of the zero-shot model and the same images; they get no gradient, and are looked at
            only if `needs_zero_shot`, when ValueError says that they are missing or of another shape.
        """
        logits = at_least_float32(logits)
        z0 = self._checked_zero_shot(zero_shot_logits, logits) if self.needs_zero_shot else logits
        if self.rescale:
            logits = calibration_losses.rescale_to_range(logits, z0)
        if self.focal:
            values = {"focal": calibration_losses.focal_loss(logits, labels, self.focal)}
        else:
            values = {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
        if self.misalignment:
            values["misalignment"] = misalignment_penalty(logits, labels, variant=self.variant, top1=self.top1)
        for name, weight in self.terms.items():
            if weight and name in ZERO_SHOT_TERMS:
                values[name] = ZERO_SHOT_TERMS[name](logits, labels, z0)
            elif weight:
                values[name] = TERMS[name](logits, labels)
        return self._added(values)

    def _added(self, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        weights = {"cross_entropy": 1.0, "focal": 1.0, "misalignment": self.misalignment, **self.terms}
        return weighted_sum(values, weights), {name: value.detach() for name, value in values.items()}

    def _checked_zero_shot(self, zero_shot_logits: Tensor | None, logits: Tensor) -> Tensor:
        if zero_shot_logits is None or zero_shot_logits.shape != logits.shape:
            asking = [f"terms {name!r}" for name, weight in self.terms.items() if weight and name in ZERO_SHOT_TERMS]
            asking += [f"rescale {self.rescale!r}"] if self.rescale else []
            got = None if zero_shot_logits is None else tuple(zero_shot_logits.shape)
            raise ValueError(
                f"{' and '.join(asking)} of the objective compare with the zero-shot model: expected zero_shot_logits "
                f"{tuple(logits.shape)}, its logits of the same samples, got {got}; robustft's methods have them, "
                "one's own loop passes s u w^T of the model before training"
            )
        return at_least_float32(zero_shot_logits.detach())
