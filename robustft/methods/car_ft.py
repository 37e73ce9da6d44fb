"""CAR-FT: context-aware robust fine-tuning (Mao et al., IJCV 2024, arXiv 2211.16175)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.prompts import Template
from robustft.methods.fine_tune import FineTuneOptions
from robustft.methods.options import digest
from robustft.methods.text_anchored import TextAnchored, captions_of, kl
from robustft.methods.unsaved import Pretrained


class CARFT(TextAnchored):
    """Fine-tuning that keeps the pre-trained model's distribution over contexts: photo, sketch, in the dark, ...

        L = objective + lambda (1/N) sum_i KL(softmax(s u0_i t^T) || softmax(s u_i t^T))

    t (M, D) are the contexts' prompt weights: of each template the unit mean of its captions' features over all
    classes, where a class embedding is the mean over templates. They are computed once, of K M captions.

    Args:
        weight: lambda. The default of 1, the direction of the divergence and the model's scale s in it are ours: the
            paper's could not be looked up.
        contexts: M templates, at least two; None for `templates`.
        others: as for `text_anchored.TextAnchored`, which says what is in memory and gets a gradient.

    Source: Mao et al., CAR-FT (IJCV 2024, arXiv 2211.16175).
    """

    term = "context"
    context_embeddings: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        contexts: Sequence[Template] | None = None,
        **options: Unpack[FineTuneOptions],
    ) -> None:
        super().__init__(model, weight=weight, **options)
        templates = self.templates if contexts is None else contexts
        of_classes = captions_of("contexts", templates, self.class_names)
        if len(templates) < 2:
            raise ValueError(
                f"contexts must be at least two templates, got {len(templates)}: among a single one nothing is told "
                "apart. Give some, or more templates, such as clip.prompts.IMAGENET_TEMPLATES"
            )
        self.config["contexts"] = digest(of_classes)
        if self.pretrained is not None:
            with torch.no_grad():
                names = [f"context {number}" for number in range(len(templates))]
                found = clip.caption_embeddings(
                    self.pretrained.held[0], self.tokenizer, list(zip(*of_classes, strict=True)), names=names
                )
            self.register_buffer("context_embeddings", found, persistent=False)

    def texts(self, pretrained: Pretrained) -> Tensor:
        return self.context_embeddings

    def divergence(self, z: Tensor, z0: Tensor) -> Tensor:
        return kl(z, z0)
