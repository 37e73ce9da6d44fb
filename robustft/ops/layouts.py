"""What a loss keeps from its forward for its backward, by the body that computes it: shapes, dtypes, bytes.

Exponentials of similarities or class logits, if they are kept, and records of tiles or rows that say what they are
relative to. Only a body's own backward reads them; fakes need their shapes, `memory` their bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops.arguments import memory_budget
from robustft.ops.registry import Body, accumulation_dtype

TRITON_KEPT = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""What Triton keeps exponentials of features in. float16's would lose bits as bfloat16, and range as float16."""
LEAST_TILE = 32
"""No side of a tile of Triton's is smaller."""
TRITON_SIDES = 11, 8
"""Rows of numbers of a sample that Triton keeps, by rows and by columns: eight statistics (`Statistics` in
similarity.py), and by rows S_ii, the teacher's, and how often the sample's label occurs."""
COMPILED_GRID = 64, 128
"""Nor of one of csrc/cpu/similarity/tiles.h, kMinRows and kMinCols there."""


class Layout(NamedTuple):
    """Shapes and dtypes of the records and of the kept exponentials."""

    records: tuple[tuple[int, ...], torch.dtype]
    exponentials: tuple[tuple[int, ...], torch.dtype]

    def like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Empty tensors of this layout, on the tensor's device."""
        records, exponentials = (tensor.new_empty(shape, dtype=dtype) for shape, dtype in self)
        return records, exponentials


def similarities(body: Body, n: int, m: int, heads: int, keep: bool, dtype: torch.dtype) -> Layout:
    """Of contrastive losses: records of tiles (csrc/cpu/similarity/tiles.h, triton/tile.py), enough for any tiles."""
    if body == "triton":
        down, across = (-(-size // LEAST_TILE) for size in (n, m))
        tiles = (heads * down * across * 2 if keep else 0,)
        return Layout((tiles, torch.float32), ((heads * n if keep else 0, pitch(m)), TRITON_KEPT[dtype]))
    dtype = accumulation_dtype(dtype)
    down, across = (-(-size // least) for size, least in zip((n, m), COMPILED_GRID, strict=True))
    return Layout(((heads, down, across + 2), dtype), ((heads * n if keep else 0, m), dtype))


def sides(body: Body, heads: int) -> tuple[int, int]:
    """Rows of numbers of a sample that a contrastive loss keeps, by rows and by columns: else `Softmaxes`."""
    return TRITON_SIDES if body == "triton" else (2 * heads, 2 * heads)


def classes(body: Body, n: int, k: int, heads: int, keep: bool, dtype: torch.dtype) -> Layout:
    """Of losses on class logits: numbers of a sample, of Triton's (triton/class_losses.py) also its tiles' maxima."""
    if body == "triton":
        maxima = heads * -(-k // LEAST_TILE) if keep else 0
        return Layout(((8 + maxima, n), torch.float32), ((n if keep else 0, heads * pitch(k)), TRITON_KEPT[dtype]))
    dtype = accumulation_dtype(dtype)
    return Layout(((3 if heads == 1 else 5, n), dtype), ((n if keep else 0, heads * k), dtype))


def pitch(m: int) -> int:
    """Entries from one kept row of Triton's to the next: a multiple of 64, so that rows are aligned."""
    return -(-m // 64) * 64


def fits(memory: str | int, body: Body, n: int, m: int, features: Tensor, matrices: int) -> bool:
    """Whether that many (n, m) matrices, in the dtype in which the body keeps them, are within `memory`."""
    kept = TRITON_KEPT[features.dtype] if body == "triton" else accumulation_dtype(features.dtype)
    return matrices * n * m * kept.itemsize <= memory_budget(memory, features.device)
