"""Where a model fails, to look at: the classes that it knows worst, and its most confident mistakes on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from robustft.clip.outputs import Outputs
from robustft.ops.kinds import checked, described

SIDE = 96


class Mistake(NamedTuple):
    """An image of another class than the predicted one: its place in the data set, its file ("" where there is none),
    and the image (H, W, 3) uint8, at most 96 pixels a side, None where the data set gives none."""

    row: int
    file: str
    predicted: str
    confidence: float
    image: np.ndarray | None


class WorstClass(NamedTuple):
    """A class, its images, the share of them predicted right, and mistakes, the most confident first."""

    name: str
    images: int
    recall: float
    mistakes: tuple[Mistake, ...]


@checked
def worst_classes(outputs: Outputs, dataset: Any, *, classes: int = 10, each: int = 6) -> tuple[WorstClass, ...]:
    """The `classes` classes of lowest recall, the worst first, with `each` mistakes at most.

    outputs: logits and labels of all images of `dataset`, in its order. Only mistakes are read from `dataset`, without
    its transform where it is one of robustft's; of items that are no PIL images there is no picture. Classes without
    images or without mistakes are left out; among equals the one with more images comes first. ValueError where outputs
    and data set differ in length, and for counts below 1.
    """
    if classes < 1 or each < 1:
        raise ValueError(f"classes and each must be at least 1, got {classes} and {each}")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or getattr(dataset, "ndim", 1) == 0:
        raise TypeError(f"dataset is {described(dataset)}; expected a map-style data set")
    if len(outputs.labels) != len(dataset):
        raise ValueError(f"outputs are of {len(outputs.labels)} images, but the data set has {len(dataset)}")
    confidence, predicted = (part.cpu() for part in outputs.probabilities.max(1))
    labels = outputs.labels.cpu()
    size = outputs.logits.shape[1]
    images = torch.bincount(labels, minlength=size)
    wrong = torch.bincount(labels[predicted != labels], minlength=size)
    names = outputs.classes or tuple(map(str, range(size)))
    order = sorted(wrong.nonzero()[:, 0].tolist(), key=lambda k: (-float(wrong[k] / images[k]), -int(images[k]), k))
    plain = dataset.with_transform(None) if callable(getattr(dataset, "with_transform", None)) else dataset
    files = getattr(dataset, "samples", ())
    found = []
    for k in order[:classes]:
        rows = ((labels == k) & (predicted != k)).nonzero()[:, 0]
        rows = rows[confidence[rows].argsort(descending=True, stable=True)][:each]
        mistakes = tuple(
            Mistake(
                row,
                str(files[row][0]) if files else "",
                names[int(predicted[row])],
                float(confidence[row]),
                _thumbnail(plain[row]),
            )
            for row in rows.tolist()
        )
        found.append(WorstClass(names[k], int(images[k]), 1.0 - float(wrong[k] / images[k]), mistakes))
    return tuple(found)


def _thumbnail(item: Any) -> np.ndarray | None:
    import PIL.Image

    image = item["image"] if isinstance(item, Mapping) else item[0]
    if not isinstance(image, PIL.Image.Image):
        return None
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return np.array(image)
