"""CLIP-Adapter (Gao et al., IJCV 2024, arXiv 2110.04544): a bottleneck on the image features.

x (N, D)  = f(x)                                       features as the tower gives them, not normalised
a (N, D)  = relu(relu(x V^T) U^T)                      V (D / r, D), U (D, D / r), without bias;  r = 4
u (N, D)  = normalize(ratio a + (1 - ratio) x)         ratio = 0.2
L         = objective(s u w^T, y)                      w (K, D) of hand-written prompts, frozen
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.outputs import Outputs
from robustft.data.seeds import stateless_generator
from robustft.methods.base import Step
from robustft.methods.frozen import FrozenModel, FrozenOptions, seeded_linear
from robustft.ops.precision import at_least_float32
from robustft.predictors.base import ModelPredictor


class CLIPAdapter(FrozenModel):
    """A residual two-layer adapter on frozen image features, under the zero-shot head.

    The released recipe is SGD at 2e-3 with cosine decay, batches of 32, 200 epochs.

    Args:
        seed: of the adapter's initial weights, torch's distribution for linear layers.
        ratio: share of the adapter in the features, in [0, 1]; the paper's is 0.2 for most data sets.
        reduction: how many times narrower the bottleneck is.
        others: as for `FrozenModel`.

    Source: Gao et al., CLIP-Adapter (IJCV 2024, arXiv 2110.04544), and its released code.
    """

    class_embeddings: Tensor

    def __init__(
        self, model: nn.Module, *, ratio: float = 0.2, reduction: int = 4, **options: Unpack[FrozenOptions]
    ) -> None:
        check_ratio(ratio)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        super().__init__(model, **options)
        w = self.zero_shot_classifier().class_embeddings
        width, generator = w.shape[1], stateless_generator(self.seed, "adapter")
        narrow = max(1, width // reduction)
        self.down = seeded_linear(width, narrow, generator, bias=False).to(w)
        self.up = seeded_linear(narrow, width, generator, bias=False).to(w)
        self.ratio = ratio
        self.register_buffer("class_embeddings", w, persistent=False)

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        with torch.no_grad():
            x = at_least_float32(clip.encode_images(self.model, images, normalize=False))
        u = adapted(x, self.down.weight, self.up.weight, self.ratio)
        w, s, z0 = self.class_embeddings, clip.logit_scale(self.model), self.reference(F.normalize(x, dim=-1))
        return Step(*self.objective(u, w, labels, s, zero_shot_logits=z0))

    def classifier(self) -> AdapterClassifier:
        """The adapter learnt so far, on the frozen model."""
        return AdapterClassifier(
            self.model,
            self.classes,
            class_embeddings=self.class_embeddings,
            logit_scale=clip.logit_scale(self.model),
            down=self.down.weight,
            up=self.up.weight,
            ratio=self.ratio,
        )


class AdapterClassifier(ModelPredictor):
    """What `CLIPAdapter` ends in; its `features` are the adapted ones."""

    tensors = {"class_embeddings": "K D", "logit_scale": "", "down": "R D", "up": "D R"}
    settings = ("ratio",)
    class_embeddings: Tensor
    logit_scale: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, model: nn.Module, classes: Sequence[str], *, ratio: float, **tensors: Tensor) -> None:
        super().__init__(model, classes, **tensors)
        check_ratio(ratio)
        self.ratio = ratio

    def _outputs(self, images: Tensor) -> Outputs:
        x = at_least_float32(clip.encode_images(self.model, images, normalize=False))
        u = adapted(x, self.down, self.up, self.ratio)
        with torch.autocast(u.device.type, enabled=False):
            cosines = u @ self.class_embeddings.to(u.dtype).T
        return Outputs(u, cosines, self.logit_scale.to(u.dtype) * cosines)


def adapted(x: Tensor, down: Tensor, up: Tensor, ratio: float) -> Tensor:
    """u (N, D) of features x (N, D), which need not be unit; down (D / r, D), up (D, D / r)."""
    with torch.autocast(x.device.type, enabled=False):
        a = F.linear(F.linear(x, down.to(x.dtype)).relu(), up.to(x.dtype)).relu()
        return F.normalize(ratio * a + (1 - ratio) * x, dim=-1)


def check_ratio(ratio: float) -> None:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
