"""One image tower under two heads: p(y | x) = beta softmax(s u w^T) + (1 - beta) softmax(s u v^T).

u (N, D) image features, w (K, D) class embeddings of default prompts, v (K, D) of concept descriptions (DRM).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.outputs import Outputs, similarities
from robustft.ops.kinds import checked
from robustft.ops.precision import at_least_float32
from robustft.predictors.base import Classifier, FeaturePredictor
from robustft.predictors.logits import mixture_log_probabilities


class DualClassifier(FeaturePredictor):
    """The mixture of a model's two heads, one image pass for both: log-probabilities as logits, cosines mixed alike.

    `model` is shared, not copied, as in `Classifier`; embeddings and scale are buffers. Over fewer classes each head is
    restricted before its own softmax, then mixed.
    Source: DRM (arXiv 2411.19757), equation 10; beta = 0.5 in the released evaluation, which encodes images twice.

    Args:
        model: the CLIP model. class_embeddings, core_embeddings: (K, D) of default prompts and of descriptions.
        classes: K names. beta: in [0, 1]; 1 is the default prompts' head alone.
        logit_scale: multiplied out; the model's by default.
    """

    tensors = {"class_embeddings": "K D", "core_embeddings": "K D", "logit_scale": ""}
    settings = ("beta",)
    class_embeddings: Tensor
    core_embeddings: Tensor
    logit_scale: Tensor

    @checked
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
        check_beta(beta)
        if core_embeddings.shape != class_embeddings.shape:
            raise ValueError(
                f"core_embeddings must be {tuple(class_embeddings.shape)}, as class_embeddings, got "
                f"{tuple(core_embeddings.shape)}"
            )
        scale = clip.logit_scale(model) if logit_scale is None else torch.as_tensor(logit_scale)
        given = {"class_embeddings": class_embeddings, "core_embeddings": core_embeddings, "logit_scale": scale}
        super().__init__(model, classes, **{name: at_least_float32(value) for name, value in given.items()})
        self.beta = beta

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

    @checked
    def head_outputs(self, features: Tensor) -> Outputs:
        """Outputs of unit features (N, D) that exist already, such as `robustft.clip.encode` keeps."""
        cosines, logits = similarities(features, self.class_embeddings, self.logit_scale)
        core_cosines, core_logits = similarities(features, self.core_embeddings, self.logit_scale)
        return Outputs(
            features,
            torch.lerp(core_cosines, cosines, self.beta),
            mixture_log_probabilities(core_logits, logits, self.beta, (1.0, 1.0)),
        )

    def _head(self, embeddings: Tensor) -> Classifier:
        return Classifier(self.model, embeddings, self.classes, logit_scale=self.logit_scale)


def check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
