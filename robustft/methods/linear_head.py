"""A linear head on image features, which FT and the linear probe train: z = u W^T + b.

W (K, D) holds the scale: it starts as s w, scale times class embeddings, as in the released code. An optimiser of
Adam's kind moves every weight by about the learning rate, so a head with the scale inside moves s times less than one
outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from robustft import clip
from robustft.clip.prompts import captions
from robustft.data.seeds import stateless_seed
from robustft.methods.base import Method, Step
from robustft.methods.objective import Objective
from robustft.methods.zero_shot_reference import ZeroShotReference
from robustft.predictors.base import Classifier
from robustft.predictors.zero_shot import zero_shot_classifier


class LinearHead(Method):
    """Image features, a head of K classes, and an objective of its logits; what is trained is a subclass's to say.

    Args:
        model, tokenizer, class_names, templates, total_steps, seed: as for `Method`; nothing here is random.
        objective: of the logits.
        label_smoothing: shorthand for that of the objective.
    """

    trains_model = True  # so that a zero-shot reference keeps a copy of it

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[Any],
        total_steps: int | None = None,
        seed: int = 0,
        objective: Objective = Objective(),
        label_smoothing: float = 0.0,
    ) -> None:
        if label_smoothing:
            if objective.label_smoothing not in (0.0, label_smoothing):
                raise ValueError(
                    f"label_smoothing is {label_smoothing} and the objective's {objective.label_smoothing}: give one"
                )
            objective = dataclasses.replace(objective, label_smoothing=label_smoothing)
        super().__init__(
            model,
            tokenizer=tokenizer,
            class_names=class_names,
            templates=templates,
            total_steps=total_steps,
            seed=seed,
        )
        self.objective = objective
        prompts = stateless_seed(0, captions(self.class_names, self.templates))
        self.config |= {"objective": dataclasses.asdict(objective), "prompts": prompts}
        self.reference = ZeroShotReference(self, trained=self.trains_model)
        self.config |= self.reference.config

    def zero_shot_classifier(self) -> Classifier:
        """The zero-shot classifier on this method's model: as long as that is frozen, the two share its pass."""
        return zero_shot_classifier(
            self.model, tokenizer=self.tokenizer, class_names=self.class_names, templates=self.templates
        )

    def start_head(self, start: Classifier, trained: Iterable[nn.Parameter] = ()) -> None:
        """Makes the head, a copy of a classifier's; it is trained, and of the model those parameters in `trained`."""
        if start.classes != self.class_names:
            raise ValueError(
                f"start must be a classifier over the same classes in the same order, got {start.classes[:5]}... for "
                f"{self.class_names[:5]}..."
            )
        chosen = {id(p) for p in trained}
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in chosen)
        self.head = nn.Parameter((start.logit_scale * start.class_embeddings).clone())
        self.register_parameter("bias", None if start.bias is None else nn.Parameter(start.bias.clone()))

    def head_step(self, features: Tensor, labels: Tensor | None, zero_shot_logits: Tensor | None) -> Step:
        """The objective of unit features (N, D) under the head; zero_shot_logits (N, K) if it asks for them."""
        if labels is None:
            raise ValueError(f"{type(self).__name__} needs labels in the batch, which has texts only")
        return Step(
            *self.objective(features, self.head, labels, 1.0, bias=self.bias, zero_shot_logits=zero_shot_logits)
        )

    def classifier(self) -> Classifier:
        """The tower and head learnt so far, with the model's scale taken back out of the head."""
        s = clip.logit_scale(self.model).detach()
        return Classifier(self.model, self.head / s, self.class_names, logit_scale=s, bias=self.bias)
