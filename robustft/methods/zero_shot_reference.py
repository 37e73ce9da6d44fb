"""The logits z0 = s u w^T of the model before training, for objectives that compare with them."""

from __future__ import annotations

import torch
from torch import Tensor

from robustft import clip
from robustft.methods.base import Method
from robustft.methods.objective import Objective
from robustft.methods.unsaved import Unsaved
from robustft.predictors.base import Classifier


class ZeroShotReference(Unsaved):
    """Logits z0 (N, K) of the zero-shot model, for an objective that compares with them; called, None for others.

    Args:
        method: whose model, as it is now, class names and templates are taken.
        objective: says whether the logits are asked for.
        trained: the method trains its model: the reference keeps a copy of it.
    """

    def __init__(self, method: Method, objective: Objective, *, trained: bool) -> None:
        if not objective.needs_zero_shot:
            super().__init__(config={})
            return
        model = method.frozen_copy() if trained else method.model
        config = {"zero_shot": {"model": clip.fingerprint(model), "prompts": method.config["captions"]}}
        super().__init__(method.zero_shot_classifier(model), config=config)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | None:
        """Logits of images (N, C, H, W), by a pass of the frozen tower, or of its unit features (N, D)."""
        if not self.held:
            return None
        (classifier,) = self.held
        assert isinstance(classifier, Classifier)
        return (classifier.head_outputs(images) if images.ndim == 2 else classifier.outputs(images)).logits
