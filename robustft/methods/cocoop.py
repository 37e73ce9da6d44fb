"""CoCoOp: conditional context optimisation (Zhou et al., CVPR 2022, arXiv 2203.05557).

    pi(x) = U relu(V u + a) + b                            the meta-net;  V (D / 16, D), U (width, D / 16)
    w_c(x) = normalize(g([v_1 + pi(x) .. v_n + pi(x)] name_c))    class embeddings that depend on the image
    z_c    = s u . w_c(x);   L = objective(z, y)

N images make N K captions: a step costs K times the text passes of CoOp, and the released recipe has batches of one.
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
from robustft.methods.coop import ContextMethod, ContextOptions
from robustft.methods.frozen import seeded_linear
from robustft.methods.prompt_learning import encode_contexts
from robustft.predictors.base import FeaturePredictor

CAPTIONS = 1024  # that a predictor encodes at a time


class CoCoOp(ContextMethod):
    """CoOp whose context is shifted, for each image, by a small network of the image's feature.

    The released recipe is 4 tokens that start as "a photo of a", SGD at 2e-3, 10 epochs, batches of one. With those
    the misalignment penalty is all or nothing at a step; larger batches give the same loss per image.

    Args:
        chunk_size: captions, of all images, encoded at a time, which are encoded a second time in the backward.
        others: as for `ContextMethod`; the context is one for all classes.

    Source: Zhou et al., CoCoOp (CVPR 2022, arXiv 2203.05557), and its released code.
    """

    def __init__(self, model: nn.Module, *, context: int | str = 4, **options: Unpack[ContextOptions]) -> None:
        super().__init__(model, context=context, **options)
        if self.context.ndim == 3:
            raise ValueError("class_specific: the context of CoCoOp is one for all classes")
        with torch.no_grad():
            features = clip.encode_texts(self.model, self.texts.tokens[:1]).shape[1]
        width = self.context.shape[-1]
        narrow, generator = max(1, features // 16), stateless_generator(self.seed, "meta-net")
        self.narrow = seeded_linear(features, narrow, generator).to(self.context)
        self.shift = seeded_linear(narrow, width, generator).to(self.context)

    @property
    def additive(self) -> bool:
        return self.objective.of_samples

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        u = self.image_features(images)
        cosines = conditional_cosines(self.model, u, chunk_size=self.chunk_size, **self._parts())
        return Step(*self.objective.of_logits(clip.logit_scale(self.model) * cosines, labels, self.reference(u)))

    def class_embeddings(self) -> Tensor:
        raise ValueError("CoCoOp has other class embeddings for every image: ask classifier() for outputs")

    def classifier(self) -> CoCoOpClassifier:
        """The predictor learnt so far; it shares the model."""
        return CoCoOpClassifier(self.model, self.classes, captions=CAPTIONS, **self._parts())

    def _parts(self) -> dict[str, Tensor]:
        return {
            "tokens": self.texts.tokens,
            "positions": self.texts.positions,
            "context": self.context,
            "narrow_weight": self.narrow.weight,
            "narrow_bias": self.narrow.bias,
            "shift_weight": self.shift.weight,
            "shift_bias": self.shift.bias,
        }


class CoCoOpClassifier(FeaturePredictor):
    """What `CoCoOp` ends in: K text passes an image, `captions` of them at a time."""

    tensors = {
        "tokens": "K L int",
        "positions": "K n int",
        "context": "n width",
        "narrow_weight": "R D",
        "narrow_bias": "R",
        "shift_weight": "width R",
        "shift_bias": "width",
    }
    settings = ("captions",)
    tokens: Tensor
    positions: Tensor
    context: Tensor

    def __init__(
        self, model: nn.Module, classes: Sequence[str], *, captions: int = CAPTIONS, **tensors: Tensor
    ) -> None:
        super().__init__(model, classes, **tensors)
        if not isinstance(captions, int) or captions < 1:
            raise ValueError(f"captions must be a whole number of at least 1, got {captions!r:.80}")
        self.captions = captions

    def check_fits(self) -> None:
        super().check_fits()
        vocabulary, width = clip.token_embedding(self.model).weight.shape
        length = getattr(clip.text_tower(self.model), "context_length", None) or self.tokens.shape[1]
        if self.context.shape[1] != width or self.tokens.shape[1] > length:
            raise ValueError(
                f"context and tokens are {tuple(self.context.shape)} and {tuple(self.tokens.shape)}, but the model "
                f"embeds at most {length} tokens, in width {width}"
            )
        for name, ids, end in (
            ("tokens", self.tokens, vocabulary),
            ("positions", self.positions, self.tokens.shape[1]),
        ):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < end:
                raise ValueError(f"{name} must lie in [0, {end}), got {int(ids.min())} to {int(ids.max())}")

    def head_outputs(self, features: Tensor) -> Outputs:
        parts = {name: getattr(self, name) for name in self.tensors}
        chunks = features.split(max(1, self.captions // len(self.classes)))
        cosines = torch.cat([conditional_cosines(self.model, chunk, **parts) for chunk in chunks])
        return Outputs(features, cosines, clip.logit_scale(self.model).detach() * cosines)


def conditional_cosines(
    model: nn.Module,
    u: Tensor,
    *,
    tokens: Tensor,
    positions: Tensor,
    context: Tensor,
    narrow_weight: Tensor,
    narrow_bias: Tensor,
    shift_weight: Tensor,
    shift_bias: Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """Cosines (N, K) of unit features u (N, D) and the class embeddings of each image."""
    n, k = len(u), len(tokens)
    with torch.autocast(u.device.type, enabled=False):
        hidden = F.linear(u.to(context.dtype), narrow_weight, narrow_bias).relu()
        shifted = context + F.linear(hidden, shift_weight, shift_bias)[:, None]
    classes = torch.arange(k, device=u.device).repeat(n)
    contexts = shifted[:, None].expand(-1, k, -1, -1).flatten(0, 1)
    w = encode_contexts(model, tokens, positions, contexts, classes, chunk_size=chunk_size)
    with torch.autocast(u.device.type, enabled=False):
        return torch.einsum("nd,nkd->nk", u, w.view(n, k, -1).to(u.dtype))
