"""One image tower under two heads: p(y | x) = beta softmax(s u w^T) + (1 - beta) softmax(s u v^T).

u (N, D) image features, w (K, D) class embeddings of default prompts, v (K, D) of concept descriptions (DRM).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.outputs import Outputs, evaluating, similarities
from robustft.predictors.base import Classifier, Predictor, save_classifier
from robustft.predictors.logits import mixture_log_probabilities


class DualClassifier(Predictor):
    """The mixture of a model's two heads, one image pass for both: log-probabilities as logits, cosines mixed alike.

    `model` is shared, not copied, as in `Classifier`; the embeddings, scale and beta are buffers.
    Source: DRM (arXiv 2411.19757), equation 10; beta = 0.5 in the released evaluation, which encodes images twice.

    Args:
        model: the CLIP model. class_embeddings, core_embeddings: (K, D) of default prompts and of descriptions.
        classes: K names. beta: in [0, 1]; 1 is the default prompts' head alone.
        logit_scale: multiplied out; the model's by default.
    """

    def __init__(
        self,
        model: nn.Module,
        class_embeddings: Tensor,
        core_embeddings: Tensor,
        classes: Sequence[str],
        *,
        beta: float = 0.5,
        logit_scale: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        check_beta(beta)
        if core_embeddings.shape != class_embeddings.shape:
            raise ValueError(
                f"core_embeddings must be {tuple(class_embeddings.shape)}, as class_embeddings, got "
                f"{tuple(core_embeddings.shape)}"
            )
        self.model = model
        self.classes = tuple(classes)
        default, core = (
            Classifier(model, head, classes, logit_scale=logit_scale) for head in (class_embeddings, core_embeddings)
        )
        self.register_buffer("class_embeddings", default.class_embeddings)
        self.register_buffer("core_embeddings", core.class_embeddings)
        self.register_buffer("logit_scale", default.logit_scale)
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))

    @property
    def default(self) -> Classifier:
        """The default prompts' head alone."""
        return self._head(self.class_embeddings)

    @property
    def core(self) -> Classifier:
        """The concept descriptions' head alone."""
        return self._head(self.core_embeddings)

    def at(self, beta: float) -> DualClassifier:
        """The same heads at another beta."""
        return DualClassifier(
            self.model,
            self.class_embeddings,
            self.core_embeddings,
            self.classes,
            beta=beta,
            logit_scale=self.logit_scale,
        )

    def outputs(self, images: Tensor) -> Outputs:
        with evaluating(self.model):
            features = clip.encode_images(self.model, images)
        cosines, logits = similarities(features, self.class_embeddings, self.logit_scale)
        core_cosines, core_logits = similarities(features, self.core_embeddings, self.logit_scale)
        beta = float(self.beta)
        return Outputs(
            features,
            torch.lerp(core_cosines, cosines, beta),
            mixture_log_probabilities(core_logits, logits, beta, (1.0, 1.0)),
        )

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> DualClassifier:
        """Each head restricted before its own softmax, then mixed."""
        keep = self._indices(classes)
        return DualClassifier(
            self.model,
            self.class_embeddings[keep],
            self.core_embeddings[keep],
            [self.classes[i] for i in keep],
            beta=float(self.beta),
            logit_scale=self.logit_scale,
        )

    def save(self, directory: str | os.PathLike[str], config: Mapping[str, Any], *, tokenizer: Any = None) -> Path:
        """Writes model and heads as `Classifier.save` does; `load_classifier` gives the dual classifier back."""
        return save_classifier(self, directory, config, tokenizer)

    def _head(self, embeddings: Tensor) -> Classifier:
        return Classifier(self.model, embeddings, self.classes, logit_scale=self.logit_scale)


def check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
