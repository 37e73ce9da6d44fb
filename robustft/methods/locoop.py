"""LoCoOp: local regularised context optimisation (Miyai et al., NeurIPS 2023, arXiv 2306.01293).

    l (N, P, D)  patch features;   q_ip = softmax(s l_ip w^T)  (K,)
    J            patches whose own top classes, the k most probable ones of q_ip, do not hold the image's label:
                 background, a stand-in for what is out of distribution
    L = objective(s u w^T, y) - 0.25 mean_J entropy(q_ip)

Background should look like no class. The learnt prompts are scored by MCM or GL-MCM (`robustft.detection`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.patches import check_patches
from robustft.methods.base import Step
from robustft.methods.coop import CoOp, CoOpOptions
from robustft.methods.options import check_weights


class LoCoOp(CoOp):
    """CoOp that flattens the class probabilities of background patches.

    The released recipe is CoOp's with 50 epochs, weight 0.25 and top 200 of ImageNet's 1000 classes. The entropy is
    exact here; the released one adds 1e-5 inside the logarithm. Memory: N P K floats for the patches' logits. Towers:
    those of `clip.encode_patches`.

    Args:
        weight: of the entropy.
        top_k: how many most probable classes a patch may have its image's label among and be foreground; None for
            a fifth of the classes, as released. K or more leaves no background.
        others: as for `CoOp`.

    Source: Miyai et al., LoCoOp (NeurIPS 2023, arXiv 2306.01293), and its released code.
    """

    takes_features = False  # a patch's features are needed too

    def __init__(
        self, model: nn.Module, *, weight: float = 0.25, top_k: int | None = None, **options: Unpack[CoOpOptions]
    ) -> None:
        check_weights(weight=weight)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        check_patches(clip.unwrap(model).visual)
        super().__init__(model, **options)
        self.weight = weight
        self.top_k = max(1, len(self.class_names) // 5) if top_k is None else top_k

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        with torch.no_grad():
            u, local = clip.encode_images_and_patches(self.model, images)
        w, s = self.class_embeddings(), clip.logit_scale(self.model)
        loss, terms = self.objective(u, w, labels, s, zero_shot_logits=self.reference(u))
        with torch.autocast(u.device.type, enabled=False):
            entropy = background_entropy(s * (local @ w.to(local.dtype).T), labels, self.top_k)
        return Step(loss - self.weight * entropy, {**terms, "background_entropy": entropy.detach()})


def background_entropy(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Mean entropy, in nats, over patches (N, P, K) whose image's label (N,) is not among their top_k; 0 if none."""
    own = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))
    background = (logits > own).sum(2) >= top_k
    log_p = logits.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    return (entropies * background).sum() / background.sum().clamp(min=1)
