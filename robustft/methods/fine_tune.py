"""FT: end-to-end cross-entropy from a zero-shot-initialised head (WiSE-FT, arXiv 2109.01903, section 3).

z = u W^T,   W (K, D) starts as s w, scale times zero-shot class embeddings;   L = CE(z, labels)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from robustft import clip
from robustft.methods.base import Classifier, Method, Step
from robustft.methods.zero_shot import zero_shot_classifier


class FineTune(Method):
    """Cross-entropy fine-tuning of the image tower and a linear head that starts as the zero-shot one.

    The head holds the scale, W = s w, as in the released code: an optimiser of Adam's kind moves every weight
    by about the learning rate, so a head with the scale inside moves s times less than one outside. There is
    no bias. The text tower and the model's scale are not trained. The released FT baseline clips gradients
    that still carry the fp16 loss scale and so hardly trains; robustft.train unscales first.

    Args:
        model, tokenizer, class_names, templates, total_steps, seed: as for `Method`; nothing here is random.
        label_smoothing: e mixes the targets as (1 - e) one-hot + e / K.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[Any],
        total_steps: int | None = None,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        super().__init__(
            model,
            tokenizer=tokenizer,
            class_names=class_names,
            templates=templates,
            total_steps=total_steps,
            seed=seed,
        )
        self.label_smoothing = label_smoothing
        start = zero_shot_classifier(self.model, tokenizer=tokenizer, class_names=class_names, templates=templates)
        trained = {id(p) for p in self.model.visual.parameters()}
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in trained)
        self.head = nn.Parameter(start.logit_scale * start.class_embeddings)
        self.config |= {"label_smoothing": label_smoothing}

    def step(self, batch: Any) -> Step:
        images, labels, _ = self.checked(batch)
        if labels is None:
            raise ValueError("FineTune needs labels in the batch, which has texts only")
        features = clip.encode_images(self.model, images)
        # The head holds the scale: half-precision logits near 50 would be rounded to steps of 1/4.
        with torch.autocast(features.device.type, enabled=False):
            logits = features @ self.head.T
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return Step(loss, {"cross_entropy": loss.detach()})

    def classifier(self) -> Classifier:
        """The fine-tuned tower and head, with the model's scale taken back out of the head."""
        s = clip.logit_scale(self.model).detach()
        return Classifier(self.model, self.head / s, self.class_names, logit_scale=s)
