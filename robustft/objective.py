"""What a class head is trained with: cross-entropy, and terms that keep its confidence honest.

    L = CE(z, y; e) + lambda M(z, y) + sum_k weight_k term_k(z, y)

    z (N, K) logits, y (N,) labels, e the label smoothing; the focal loss may take the place of CE
    M         the misalignment penalty of CMP (arXiv 2501.17595), `functional.misalignment_penalty`
    term_k    others of the same interface, by name, from `TERMS`; their mathematics is in `calibration_losses`

Every method with class logits (FineTune, LinearProbe, the prompt learners, the adapters) takes one, so that each term
meets each host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft import calibration_losses
from robustft.functional import classification_loss, misalignment_penalty
from robustft.ops import arguments

Term = Callable[[Tensor, Tensor], Tensor]

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


@dataclass(frozen=True)
class Objective:
    """Cross-entropy with a misalignment penalty and other terms; of weight 0, none of them is computed.

    Args:
        label_smoothing: e mixes the targets as (1 - e) one-hot + e / K.
        misalignment: lambda, the weight of the misalignment penalty; CMP's released command has 1.
        variant, top1: of the penalty, as in `functional.classification_loss`.
        terms: weights of further terms, by their name in `TERMS`.
        focal: gamma of the focal loss, which then takes the cross-entropy's place (and its name among the terms is
            "focal"); 0 is cross-entropy. It does not go with label smoothing.

    Raises ValueError naming what is out of range or unknown.
    """

    label_smoothing: float = 0.0
    misalignment: float = 0.0
    variant: str = "neg_log_ratio"
    top1: bool = False
    terms: Mapping[str, float] = field(default_factory=dict)
    focal: float = 0.0

    def __post_init__(self) -> None:
        arguments.check_smoothing(self.label_smoothing)
        arguments.check_variant(self.variant)
        if self.focal and self.label_smoothing:
            raise ValueError(f"focal is {self.focal}, label_smoothing {self.label_smoothing}: use one of them")
        if unknown := [name for name in self.terms if name not in TERMS]:
            raise ValueError(f"terms holds {unknown}; expected some of {sorted(TERMS)}")
        for name, weight in {"focal": self.focal, "misalignment": self.misalignment, **self.terms}.items():
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight}; expected it finite and not negative")

    def __call__(
        self,
        features: Tensor,
        class_embeddings: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        *,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of features (N, D) under a head (K, D), and its terms, un-weighted and detached.

        Logits exist as a matrix (N, K) only if the focal loss or one of `terms` needs them.
        """
        if self.focal or any(self.terms.values()):
            with torch.autocast(features.device.type, enabled=False):
                logits = logit_scale * (features @ class_embeddings.to(features.dtype).T)
            return self.of_logits(logits if bias is None else logits + bias, labels)
        terms = classification_loss(
            features,
            class_embeddings,
            labels,
            logit_scale,
            bias=bias,
            variant=self.variant,
            top1=self.top1,
            label_smoothing=self.label_smoothing,
        )
        if not self.misalignment:
            return terms.cross_entropy, {"cross_entropy": terms.cross_entropy.detach()}
        loss = terms.cross_entropy + self.misalignment * terms.misalignment
        return loss, {name: value.detach() for name, value in terms._asdict().items()}

    def of_logits(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of logits (N, K) that exist already, for hosts whose head is no fixed matrix."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.focal:
            values = {"focal": calibration_losses.focal_loss(logits, labels, self.focal)}
        else:
            values = {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
        (loss,) = values.values()
        if self.misalignment:
            values["misalignment"] = misalignment_penalty(logits, labels, variant=self.variant, top1=self.top1)
            loss = loss + self.misalignment * values["misalignment"]
        for name, weight in self.terms.items():
            if weight:
                values[name] = TERMS[name](logits, labels)
                loss = loss + weight * values[name]
        return loss, {name: value.detach() for name, value in values.items()}
