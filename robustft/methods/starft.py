"""StarFT: spurious textual alignment regularisation (Kim et al., IJCAI 2025, arXiv 2505.13232).

u, u0 (N, D)   image features, tuned and pre-trained
v, v0 (N, D)   features of spurious captions, template(class) with an attribute that goes with classes by chance, one
               drawn for each image: "a photo of a {} in the snow"
z = s0 u v^T,  z0 = s0 u0 v0^T    without the pairs of one class;   s0 the pre-trained scale

L = FLYP's contrastive loss + lambda (1 - t / T) (1/N) sum_i KL(softmax(z0)_i || softmax(z)_i)      at step t of T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.outputs import similarities
from robustft.clip.prompts import PromptTable, Template
from robustft.data.seeds import stateless_generator
from robustft.data.sources import on_host
from robustft.methods.base import Step
from robustft.methods.flyp import CaptionMethod, CaptionOptions, Pairs
from robustft.methods.kept_texts import KeptTexts
from robustft.methods.options import check_weights, digest
from robustft.methods.text_anchored import captions_of, kl
from robustft.methods.unsaved import Pretrained
from robustft.predictors.base import Classifier

EXCLUDED = -1e8  # the logit of a pair of one class: a probability of 0, and none of NaN where all pairs are


class StarFT(CaptionMethod):
    """FLYP, held to the pre-trained model on captions with spurious attributes, so that it learns none of these.

    Of the captions of other classes in the batch, each with such an attribute, the distribution stays as it was. Both
    towers get a gradient of both terms. The pre-trained model is kept, frozen, and encodes images and spurious captions
    without a gradient: one more model in memory, and matrices (N, N). It is no part of `state_dict()`. Batches need
    labels.

    Args:
        spurious: templates that put a class where it is by chance. The paper has a language model write them: of
            backgrounds, textures and the like. None of them is a class of yours.
        weight: lambda; 0.5 in the released example. At 0 this is `FLYP`.
        diminishing: lambda goes to 0 over the run, as released: there epoch by epoch, here step by step. The run's
            length is needed then: `total_steps`, or `begin_run` before the first step.
        others: as for `CaptionMethod`. `seed` is also that of the spurious captions.

    Source: Kim et al., StarFT (IJCAI 2025, arXiv 2505.13232), section 3.2, and its released code, of which this is the
    regulariser "star" beside the contrastive loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        spurious: Sequence[Template],
        weight: float = 0.5,
        diminishing: bool = True,
        **options: Unpack[CaptionOptions],
    ) -> None:
        check_weights(weight=weight)
        super().__init__(model, **options)
        self.config["spurious"] = digest(captions_of("spurious", spurious, self.class_names))
        self.spurious = PromptTable(self.tokenizer, self.class_names, spurious)
        self.spurious_texts = KeptTexts(self.spurious)
        self.weight, self.diminishing = weight, diminishing
        self.pretrained = Pretrained(self) if weight else None
        self.config |= self.pretrained.config if self.pretrained else {}

    def step(self, batch: Any) -> Step:
        pairs = self.pairs(batch)
        u, t = self.features(self.model, pairs)
        terms = {"contrastive": self.contrastive(u, t, pairs)}
        if self.pretrained is not None:
            terms["spurious"] = self._spurious(self.pretrained, u, pairs)
        return Step.of(terms, {"contrastive": 1.0, "spurious": self.share() * self.weight})

    def share(self) -> float:
        """The part of lambda that the next step has."""
        return max(0.0, 1.0 - self.steps_done / self.run_length()) if self.weight and self.diminishing else 1.0

    def classifier(self) -> Classifier:
        """The fine-tuned image tower, and the prompts' class embeddings under the fine-tuned text tower."""
        return self.zero_shot_classifier()

    def _spurious(self, pretrained: Pretrained, u: Tensor, pairs: Pairs) -> Tensor:
        if pairs.classes is None:
            raise ValueError("StarFT needs labels in the batch, which has texts only")
        generator = stateless_generator(self.seed, "spurious captions", self.steps_done)
        captions, rows = self.spurious.draw(on_host(pairs.classes), generator).unique(return_inverse=True)
        tokens, rows = (part.to(u.device, non_blocking=True) for part in (self.spurious.captions[captions], rows))
        kept = self.spurious_texts.of(pretrained.model, captions, self.told_length)
        texts = clip.encode_texts(self.model, tokens), pretrained.text_features(tokens) if kept is None else kept
        # F.embedding, because the gradient of v[index] adds up in no fixed order on several threads.
        v, v0 = (F.embedding(rows, found) for found in texts)
        u0, s0 = pretrained.image_features(pairs.images), pretrained.logit_scale
        same = pairs.classes[:, None] == pairs.classes
        z, z0 = (similarities(x, y, s0)[1].masked_fill(same, EXCLUDED) for x, y in ((u, v), (u0, v0)))
        return kl(z, z0).mean()
