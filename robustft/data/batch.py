"""What a batch may be: (images, labels), (images, texts) or {"image": ..., "label" and / or "text": ...}.

A dictionary may carry more, which the methods that know it take and the others leave: "group" (N,), "core" (N,) or
(N, K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Batch(NamedTuple):
    """Images (N, C, H, W), labels (N,) or None, texts (captions or their tokens (N, L)) or None."""

    images: Tensor
    labels: Tensor | None
    texts: Sequence[str] | Tensor | None


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless every label lies in [0, classes)."""
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise ValueError(f"labels must lie in [0, K) with K = {classes} classes, got {bad}")


def column(batch: Any, name: str, images: Tensor) -> Tensor | None:
    """A further tensor of a dictionary batch, one row for each image, on their device; None where there is none."""
    if not isinstance(batch, Mapping) or name not in batch:
        return None
    value = batch[name]
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(images):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f'batch["{name}"] must be a tensor with a row for each of the {len(images)} images, got {got}')
    return value.to(images.device)


def unpack(batch: Any, features: bool = False) -> Batch:
    """The parts of a batch, checked as far as they can be without a model; `features` (N, D) may stand for images."""
    if isinstance(batch, Mapping):
        if "image" not in batch or not ({"label", "text"} & batch.keys()):
            raise ValueError(f'batch must have "image" and "label" or "text", got the keys {sorted(batch)}')
        images, labels, texts = batch["image"], batch.get("label"), batch.get("text")
    elif isinstance(batch, Sequence) and len(batch) == 2:
        images, target = batch
        is_labels = isinstance(target, Tensor) and target.ndim < 2
        labels, texts = (target, None) if is_labels else (None, target)
    else:
        raise TypeError(
            f"batch must be (images, labels), (images, texts) or a dictionary, got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        )
    if not isinstance(images, Tensor) or not (images.ndim == 4 or features and images.ndim == 2):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor (N, C, H, W){' or features (N, D)' * features}, got {got}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point (apply the model's transform first), got {images.dtype}")
    if len(images) == 0:
        raise ValueError("batch is empty")
    if labels is not None:
        dtype = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        if dtype not in INTEGERS:
            raise TypeError(f"labels must be an integer tensor (N,), got {dtype}")
        if labels.shape != (len(images),):
            raise ValueError(f"labels must have shape ({len(images)},), one for each image, got {tuple(labels.shape)}")
    if texts is not None:
        if isinstance(texts, str) or not isinstance(texts, (Tensor, Sequence)):
            raise TypeError(f"texts must be a list of captions or their tokens (N, L), got {type(texts).__name__}")
        if isinstance(texts, Tensor) and (texts.ndim != 2 or texts.dtype not in INTEGERS):
            raise TypeError(f"text tokens must be integers (N, L), got {texts.dtype} of shape {tuple(texts.shape)}")
        if len(texts) != len(images):
            raise ValueError(f"there must be one text for each of the {len(images)} images, got {len(texts)}")
    return Batch(images, labels, texts)
