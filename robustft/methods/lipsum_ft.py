"""Lipsum-FT: robust fine-tuning with random text guidance (Nam, Heo, Lee, ICLR 2024, arXiv 2404.00860)."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from robustft.clip.random_texts import RandomTexts
from robustft.data.seeds import stateless_generator
from robustft.methods.fine_tune import FineTuneOptions
from robustft.methods.text_anchored import TextAnchored, squared
from robustft.methods.unsaved import Pretrained
from robustft.ops.arguments import check_count


class LipsumFT(TextAnchored):
    """Fine-tuning that keeps the image tower's inner products with random texts as the pre-trained model has them.

        L = objective + lambda (1/N) sum_i 1/(2M) || s u_i t^T - s u0_i t^T ||^2

    The texts t (M, D) are drawn anew at every step: random tokens between those that open and close a text. The paper
    calls the second term an energy gap, because inner products are a joint energy of image and text. The released code
    draws padding, too, which CLIP's tower reads as a word; here it is left out, for towers that mask it.

    Args:
        weight: lambda; 1 in the released command.
        texts: M; 80 there. length: tokens of each; 8 there.
        others: as for `text_anchored.TextAnchored`, which says what is in memory and gets a gradient. `seed` is that of
            the texts.

    Source: Nam et al., Lipsum-FT (ICLR 2024, arXiv 2404.00860), section 5.1, and its released code.
    """

    term = "energy_gap"

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        texts: int = 80,
        length: int = 8,
        **options: Unpack[FineTuneOptions],
    ) -> None:
        if texts < 1:
            raise ValueError(f"texts must be at least 1, got {texts}")
        check_count("texts", texts)
        super().__init__(model, weight=weight, **options)
        self.count = texts
        self.random_texts = RandomTexts(self.model, self.tokenizer, length)

    def texts(self, pretrained: Pretrained) -> Tensor:
        generator = stateless_generator(self.seed, "random texts", self.steps_done)
        return pretrained.text_features(self.random_texts.draw(self.count, generator).to(self.steps.device))

    def divergence(self, z: Tensor, z0: Tensor) -> Tensor:
        return squared(z, z0)
