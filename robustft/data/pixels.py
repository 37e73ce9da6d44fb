"""Whether images are still pixels: a model trained on normalised ones makes features of them, and wrong ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Batch = TypeVar("Batch", bound=Any)


def warning_of_raw_pixels(batches: Iterator[Batch], statistics: Statistics | None) -> Iterator[Batch]:
    """The batches as they are, with a warning if the first holds pixels: whole numbers from 0 to 255, or these
    divided by 255. statistics: (mean, std) that the model wants images normalised by, None if not known."""
    for number, batch in enumerate(batches):
        images = (batch["image"] if isinstance(batch, Mapping) else batch[0]) if number == 0 else None
        if isinstance(images, Tensor) and (highest := raw_range(images, statistics)) is not None:
            kind = "whole numbers from 0 to 255" if highest == 255 else "255ths from 0 to 1, as ToTensor makes them"
            expected = "" if statistics is None else f" by mean {statistics[0]} and std {statistics[1]}"
            # At this line, not the caller's, so that it is said once.
            warnings.warn(
                f"images hold {kind}: the model expects them normalised{expected}; pass its transform", stacklevel=1
            )
        yield batch


def raw_range(images: Tensor, statistics: Statistics | None) -> int | None:
    """255 or 1 where images (N, C, H, W) are plainly pixels from 0 to that, None where they are not.

    Plainly: every value is a whole multiple of one 255th of the range, they differ, and the highest is over 20 of
    those. Pixels that the model's own statistics leave as they are count as normalised.
    """
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64) or not images.numel():
        return None
    lowest, highest = (float(bound) for bound in images.aminmax())
    for top in (255, 1):
        step = top / 255
        if not (lowest >= 0 and 20 * step < highest <= top and lowest < highest):
            continue
        wanted = statistics is not None and all(
            m == 0 and abs(s * top - 1) < 1e-6 for m, s in zip(*statistics, strict=True)
        )
        steps = images / step
        if not wanted and float((steps - steps.round()).abs().max()) < 1e-3:
            return top
    return None
