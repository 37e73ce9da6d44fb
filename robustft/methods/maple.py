"""MaPLe: multi-modal prompt learning (Khattak et al., CVPR 2023, arXiv 2210.03117).

    P_j (n, text width)             text prompts of blocks j = 0 .. J - 1; P_0 is the context of the captions
    Q_j (n, visual width) = P_j A_j^T + b_j      image prompts, coupled to them by a linear map of each block
    w_c = normalize(g(P_0 name_c; P_1 .. P_J-1))
    u   = normalize(f(x; Q_0 .. Q_J-1));   L = objective(s u w^T, y)

Both towers stay frozen, yet the gradient runs through both: a step costs as much as fine-tuning, without its memory
for weights. How prompts enter the towers: `robustft.clip.deep_prompts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip import deep_prompts
from robustft.clip.outputs import Outputs
from robustft.data.seeds import stateless_generator
from robustft.methods.base import Step
from robustft.methods.coop import ContextMethod, ContextOptions
from robustft.methods.frozen import seeded_linear
from robustft.predictors.base import ModelPredictor


class MaPLe(ContextMethod):
    """Prompts in both towers, in their first blocks, coupled.

    The released recipe is 2 tokens that start as "a photo", 9 of 12 blocks, SGD at 3.5e-3, batches of 4, 5 epochs.
    Deeper text prompts start as N(0, 0.02). The image tower must be a ViT, open_clip's own or timm's (SigLIP, PE, EVA,
    ViTamin), pooled at its class token or otherwise: prompts are dropped before pooling. The text tower must be
    open_clip's own.

    Args:
        seed: of the prompts and the maps.
        context: words to start from, or a number of tokens.
        depth: J, how many blocks have prompts of their own; None for three quarters of the shallower tower's.
        others: as for `ContextMethod`; the context is one for all classes, before the name, in one batch.

    Source: Khattak et al., MaPLe (CVPR 2023, arXiv 2210.03117), and its released code.
    """

    takes_features = False  # the image tower has prompts of its own
    recomputes = False  # a block that is run again in the backward would not find its prompt any more

    def __init__(
        self, model: nn.Module, *, context: int | str = 2, depth: int | None = None, **options: Unpack[ContextOptions]
    ) -> None:
        for name in ("class_specific", "position", "chunk_size"):
            if name in options:
                raise ValueError(f"{name}: the context of MaPLe is one for all classes, before the name, in one batch")
        most = min(deep_prompts.text_layers(model), deep_prompts.visual_layers(model))
        depth = max(1, round(0.75 * most)) if depth is None else depth
        if not 1 <= depth <= most:
            raise ValueError(f"depth must lie in [1, {most}], the blocks of the shallower tower, got {depth}")
        super().__init__(model, context=context, **options)
        generator, width = stateless_generator(self.seed, "deep prompts"), self.context.shape[1]
        self.deep = nn.ParameterList(
            nn.Parameter((0.02 * torch.randn(self.context.shape, generator=generator)).to(self.context))
            for _ in range(depth - 1)
        )
        self.couplings = nn.ModuleList(
            seeded_linear(width, deep_prompts.visual_width(model), generator) for _ in range(depth)
        ).to(self.context)

    def class_embeddings(self) -> Tensor:
        with deep_prompts.text_prompts(self.model, list(self.deep), self.texts.positions):
            return super().class_embeddings()

    def visual_prompts(self) -> Tensor:
        """Q (J, n, visual width); the gradient reaches prompts and couplings."""
        prompts = [self.context, *self.deep]
        return torch.stack([coupling(p) for coupling, p in zip(self.couplings, prompts, strict=True)])

    @property
    def additive(self) -> bool:
        return self.objective.of_samples

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        with deep_prompts.visual_prompts(self.model, list(self.visual_prompts())):
            u = clip.encode_images(self.model, images)
        w, s, z0 = self.class_embeddings(), clip.logit_scale(self.model), self.reference(images)
        return Step(*self.objective(u, w, labels, s, zero_shot_logits=z0))

    @torch.no_grad()
    def classifier(self) -> MaPLeClassifier:
        """The model with the image prompts learnt so far, and the class embeddings."""
        return MaPLeClassifier(
            self.model,
            self.classes,
            class_embeddings=self.class_embeddings(),
            logit_scale=clip.logit_scale(self.model),
            prompts=self.visual_prompts(),
        )


class MaPLeClassifier(ModelPredictor):
    """What `MaPLe` ends in: a fixed head, on an image tower with prompts."""

    tensors = {"class_embeddings": "K D", "logit_scale": "", "prompts": "J n width"}
    class_embeddings: Tensor
    logit_scale: Tensor
    prompts: Tensor

    def check_fits(self) -> None:
        super().check_fits()
        layers, width = deep_prompts.visual_layers(self.model), deep_prompts.visual_width(self.model)
        if not 1 <= len(self.prompts) <= layers or self.prompts.shape[2] != width:
            raise ValueError(
                f"prompts must be (J, n, {width}) for at most the model's {layers} blocks, got "
                f"{tuple(self.prompts.shape)}"
            )

    def _outputs(self, images: Tensor) -> Outputs:
        with deep_prompts.visual_prompts(self.model, list(self.prompts)):
            u = clip.encode_images(self.model, images)
        with torch.autocast(u.device.type, enabled=False):
            cosines = u @ self.class_embeddings.to(u.dtype).T
        return Outputs(u, cosines, self.logit_scale.to(u.dtype) * cosines)
