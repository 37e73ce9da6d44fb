"""CoOp: context optimisation (Zhou et al., IJCV 2022, arXiv 2109.01134), and KgCoOp (Yao et al., CVPR 2023).

    w_c = normalize(g([v_1 .. v_n] name_c))         the context v (n, width), or one of each class (K, n, width)
    L   = objective(s u w^T, y)                     both towers and the scale are frozen

KgCoOp (arXiv 2303.13283) keeps the learnt embeddings near those of hand-written prompts, w0:

    L   = objective(s u w^T, y) + 8 mean_c (1 - cos(w_c, w0_c))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.methods.base import Step
from robustft.methods.frozen import FrozenModel, FrozenOptions
from robustft.methods.options import check_weights
from robustft.methods.prompt_learning import (
    ContextTexts,
    Position,
    check_chunk_size,
    context_length,
    initial_context,
    random_context,
)
from robustft.predictors.base import Classifier


class ContextOptions(FrozenOptions, total=False):
    """The options of `ContextMethod` but its context, for the constructors that hand them on."""

    class_specific: bool
    position: Position
    chunk_size: int | None


class CoOpOptions(ContextOptions, total=False):
    """All options of `ContextMethod`, likewise."""

    context: int | str


class ContextMethod(FrozenModel):
    """A method that learns the context of a prompt.

    Args:
        context: words to start from ("a photo of a"), or a number of tokens that start as N(0, 0.02).
        class_specific: each class learns a context of its own.
        position: of the name, as in `robustft.methods.prompt_learning`.
        chunk_size: captions encoded at a time, which are encoded a second time in the backward.
        templates: what follows the name in the first follows it here too.
        seed: of the random initial context; nothing else is random.
        others: as for `FrozenModel`.

    Raises ValueError for a name that leaves too few tokens for the context, and for text towers other than open_clip's.
    """

    takes_features = True
    uncompared = ("chunk_size",)

    learns_prompts = True

    def __init__(
        self,
        model: nn.Module,
        *,
        context: int | str = 16,
        class_specific: bool = False,
        position: Position = "end",
        chunk_size: int | None = None,
        **options: Unpack[FrozenOptions],
    ) -> None:
        check_chunk_size(chunk_size)
        super().__init__(model, **options)
        classes, length = len(self.class_names), context_length(self.tokenizer, context)
        texts = ContextTexts(self.tokenizer, self.class_names, self.templates[0], length, position)
        start = initial_context(self.model, self.tokenizer, context, self.seed)
        self.texts = texts.to(start.device)
        if class_specific and isinstance(context, int):
            start = random_context((classes, *start.shape), self.seed, start.dtype, start.device)
        elif class_specific:
            start = start.repeat(classes, 1, 1)
        self.context = nn.Parameter(start)
        self.chunk_size = chunk_size

    def class_embeddings(self) -> Tensor:
        """w (K, D), unit rows; the gradient reaches the context."""
        return self.texts(self.model, self.context, chunk_size=self.chunk_size)


class CoOp(ContextMethod):
    """Few-shot learning of the context of a prompt; `Objective(misalignment=1.)` makes it CoOp + CMP.

    The released recipe is 16 random tokens, the name at the end, SGD at 2e-3 with cosine decay, batches of 32, 50 to
    200 epochs, random crops and flips. `robustft.fit` has AdamW: rates of 0.01 to 0.05 did well on GlyphWorld, with
    weight_decay=0, as its default is one for fine-tuning. K captions are encoded in one batch a step; for many classes
    `chunk_size` bounds the memory.

    Args:
        all: as for `ContextMethod`.

    Source: Zhou et al., CoOp (IJCV 2022, arXiv 2109.01134), and its released code.
    """

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        u, s = self.image_features(images), clip.logit_scale(self.model)
        return Step(*self.objective(u, self.class_embeddings(), labels, s, zero_shot_logits=self.reference(u)))

    @torch.no_grad()
    def classifier(self) -> Classifier:
        """The frozen image tower and the class embeddings of the learnt context."""
        return Classifier(self.model, self.class_embeddings(), self.classes)


class KgCoOp(CoOp):
    """CoOp whose class embeddings stay near those of hand-written prompts, for classes and domains not trained on.

    Args:
        weight: of the distance; 8 as released.
        templates: the hand-written prompts (one a data set in the released code), averaged as for zero-shot.
        others: as for `CoOp`.

    Source: Yao et al., KgCoOp (CVPR 2023, arXiv 2303.13283), and its released code.
    """

    hand_embeddings: Tensor

    def __init__(self, model: nn.Module, *, weight: float = 8.0, **options: Unpack[CoOpOptions]) -> None:
        check_weights(weight=weight)
        super().__init__(model, **options)
        self.weight = weight
        self.register_buffer("hand_embeddings", self.zero_shot_classifier().class_embeddings, persistent=False)

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        u, w = self.image_features(images), self.class_embeddings()
        s, z0 = clip.logit_scale(self.model), self.reference(u)
        loss, terms = self.objective(u, w, labels, s, zero_shot_logits=z0)
        distance = (1 - F.cosine_similarity(w, self.hand_embeddings.to(w.dtype), dim=-1)).mean()
        return Step(loss + self.weight * distance, {**terms, "distance": distance.detach()})
