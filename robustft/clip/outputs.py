"""What a CLIP classifier makes of images, the similarities it is made from, and the mode it is made in.

u = normalize(f(x))  (N, D)     image features
w                    (K, D)     class embeddings, one row a class
z = s u w^T          (N, K)     logits
c = u normalize(w)^T (N, K)     cosines, what OOD scores such as MCM are made of
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Outputs(NamedTuple):
    """Unit image features (N, D), cosines to the class embeddings (N, K), logits (N, K); at least float32."""

    features: Tensor
    cosines: Tensor
    logits: Tensor


def similarities(features: Tensor, class_embeddings: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines u normalize(w)^T and logits s u w^T, (N, K) each, of unit features (N, D) and embeddings (K, D)."""
    w = class_embeddings.to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return features @ F.normalize(w, dim=-1).T, logit_scale.to(features.dtype) * (features @ w.T)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
