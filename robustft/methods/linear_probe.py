"""LP: a linear probe, a head trained on frozen features.

z = u W^T + b,   W (K, D) starts as s w of the zero-shot classifier, or as 0;   L = objective(z, labels)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.outputs import evaluating
from robustft.methods.base import Step
from robustft.methods.linear_head import HeadOptions, LinearHead
from robustft.predictors.base import Classifier


class LinearProbe(LinearHead):
    """Training of a linear head alone; the tower stays as it was, in evaluation mode.

    A batch holds images, or their unit features (N, D) in the images' place: `robustft.clip.encode` once, then
    `fit(probe, (features.image_features, features.labels), ...)` trains without the tower.

    The zero-shot classifier to mix it with (WiSEFT, OutputEnsemble, VRF) is `probe.zero_shot_classifier()`: on one
    encoder, so an ensemble of outputs takes one pass, and WiSE-FT and OSE differ only in where the softmax is.

    Args:
        init: "zero_shot", the head starts as the zero-shot one; "zero", and learns from the labels alone.
        bias: a bias (K,) that starts at 0.
        others: as for `LinearHead`; nothing here is random.

    Source: Radford et al., CLIP (arXiv 2103.00020), section 3.2, who fit it by L-BFGS; here it is trained step by step,
    as in LP-FT (arXiv 2202.10054).
    """

    takes_features = True
    trains_model = False
    towers = ()

    def __init__(
        self,
        model: nn.Module,
        *,
        init: Literal["zero_shot", "zero"] = "zero_shot",
        bias: bool = True,
        **options: Unpack[HeadOptions],
    ) -> None:
        if init not in ("zero_shot", "zero"):
            raise ValueError(f'init must be "zero_shot" or "zero", got {init!r}')
        super().__init__(model, **options)
        start = self.zero_shot_classifier()
        w = start.class_embeddings if init == "zero_shot" else torch.zeros_like(start.class_embeddings)
        b = w.new_zeros(len(w)) if bias else None
        self.start_head(Classifier(self.model, w, self.classes, bias=b))

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        u = images if images.ndim == 2 else self.features(images)
        return self.head_step(u, labels, self.reference(u))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit features (N, D) of images by the frozen tower."""
        with evaluating(self.model):
            return clip.encode_images(self.model, images)
