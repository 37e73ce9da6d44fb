"""A linear head on image features, which FT and the linear probe train: z = u W^T + b.

W (K, D) holds the scale: it starts as s w, scale times class embeddings, as in the released code. An optimiser of
Adam's kind moves every weight by about the learning rate, so a head with the scale inside moves s times less than one
outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.methods.base import Method, Shared, Step
from robustft.methods.objective import Objective
from robustft.methods.options import described
from robustft.methods.zero_shot_reference import ZeroShotReference
from robustft.predictors.base import Classifier


class HeadOptions(Shared, total=False):
    """The options of `LinearHead`, for the constructors that hand them on."""

    objective: Objective
    label_smoothing: float


class LinearHead(Method):
    """Image features, a head of K classes, and an objective of its logits; what is trained is a subclass's to say.

    Args:
        objective: of the logits; cross-entropy by default.
        label_smoothing: shorthand for that of the objective: e mixes the targets as (1 - e) one-hot + e / K.
        others: as for `Method`.
    """

    uncompared = ("label_smoothing",)  # it is in the objective
    trains_model = True  # so that a zero-shot reference keeps a copy of it
    head: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective = Objective(),
        label_smoothing: float = 0.0,
        **shared: Unpack[Shared],
    ) -> None:
        if label_smoothing:
            if objective.label_smoothing not in (0.0, label_smoothing):
                raise ValueError(
                    f"label_smoothing is {label_smoothing} and the objective's {objective.label_smoothing}: give one"
                )
            objective = dataclasses.replace(objective, label_smoothing=label_smoothing)
        super().__init__(model, **shared)
        self.objective = objective
        self.reference = ZeroShotReference(self, objective, trained=self.trains_model)
        self.config |= {"objective": described(objective, "objective"), **self.reference.config}

    def start_head(self, start: Classifier, trained: Iterable[nn.Parameter] = ()) -> None:
        """Makes the head, a copy of a classifier's; it is trained, and of the model those parameters in `trained`."""
        if start.classes != self.classes:
            raise ValueError(
                f"start must be a classifier over the same classes in the same order, got {start.classes[:5]}... for "
                f"{self.classes[:5]}..."
            )
        chosen = {id(p) for p in trained}
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in chosen)
        self.head = nn.Parameter((start.logit_scale * start.class_embeddings).clone())
        self.register_parameter("bias", None if start.bias is None else nn.Parameter(start.bias.clone()))

    @property
    def additive(self) -> bool:
        return self.objective.of_samples

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        return self.head_step(clip.encode_images(self.model, images), labels, self.reference(images))

    def head_step(self, features: Tensor, labels: Tensor, zero_shot_logits: Tensor | None) -> Step:
        """The objective of unit features (N, D) under the head; zero_shot_logits (N, K) if it asks for them."""
        return Step(
            *self.objective(features, self.head, labels, 1.0, bias=self.bias, zero_shot_logits=zero_shot_logits)
        )

    def classifier(self) -> Classifier:
        """The tower and head learnt so far, with the model's scale taken back out of the head."""
        s = clip.logit_scale(self.model).detach()
        return Classifier(self.model, self.head / s, self.classes, logit_scale=s, bias=self.bias)
