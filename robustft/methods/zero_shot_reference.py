"""The logits z0 = s u w^T of the model before training, for objectives that compare with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.methods.base import Method
from robustft.methods.objective import Objective
from robustft.predictors.base import Classifier


class ZeroShotReference(nn.Module):
    """Logits z0 (N, K) of the zero-shot model, for an objective that compares with them; called, None for others.

    It is a method's submodule and moves with it, yet has no parameters and no state: who makes the method again makes
    it again, so that checkpoints hold no second model. `config`, a part of the method's, identifies the model and the
    prompts: a run is resumed with the same ones.

    Args:
        method: whose model, as it is now, class names and templates are taken.
        objective: says whether the logits are asked for.
        trained: the method trains its model: the reference keeps a copy of it.
    """

    def __init__(self, method: Method, objective: Objective, *, trained: bool) -> None:
        super().__init__()
        self._classifier: tuple[Classifier, ...] = ()  # in a tuple, where nn.Module looks for no submodule
        self.config: dict[str, Any] = {}
        if objective.needs_zero_shot:
            model = method.frozen_copy() if trained else method.model
            self._classifier = (method.zero_shot_classifier(model),)
            self.config = {"zero_shot": {"model": clip.fingerprint(model), "prompts": method.config["captions"]}}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | None:
        """Logits of images (N, C, H, W), by a pass of the frozen tower, or of its unit features (N, D)."""
        if not self._classifier:
            return None
        (classifier,) = self._classifier
        return (classifier.head_outputs(images) if images.ndim == 2 else classifier.outputs(images)).logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZeroShotReference:
        for classifier in self._classifier:  # .to(device) and .double() come by here
            classifier._apply(fn, recurse)
        return super()._apply(fn, recurse)
