"""Nearest neighbours over the compiled search (csrc/cpu/neighbors.cpp): points prepared once, searched many times."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops.native.registration import accumulation_dtype, fake


class PackedPoints(NamedTuple):
    """Points (n, d) and what csrc/cpu/neighbor_pack.cpp makes of them."""

    points: Tensor
    centre: Tensor
    bias: Tensor
    filter: Tensor
    sample: Tensor
    bounds: Tensor

    @property
    def finite(self) -> bool:
        return not bool(self.bounds[0].isnan())


def sample_size(n: int) -> int:
    """How many points a search looks at to guess where to start; small sets are searched without."""
    return 0 if n < 8192 else min(8192, max(2048, n // 64))


def pack(points: Tensor) -> PackedPoints:
    """Reads the points once; they are referred to, not copied."""
    return PackedPoints(points, *torch.ops.robustft.neighbor_pack(points, sample_size(len(points))))


def _fake_pack(points, samples):
    n, d = points.shape
    filter_size = torch.library.get_ctx().new_dynamic_size()  # it depends on the processor
    new, dtype = points.new_empty, accumulation_dtype(points.dtype)
    centre, bias, sample = (new(*shape, dtype=dtype) for shape in ((d,), (n,), (min(samples, n), d)))
    return centre, bias, new(filter_size, dtype=torch.int16), sample, new(3, dtype=torch.float64)


def _fake_kth(queries, points, centre, bias, filter, sample, bounds, k, squared):
    return queries.new_empty(queries.shape[0], dtype=accumulation_dtype(points.dtype))


def _fake_nearest(queries, points, centre, bias, filter, sample, bounds, k, squared):
    shape = queries.shape[0], k
    distances = queries.new_empty(shape, dtype=accumulation_dtype(points.dtype))
    return distances, queries.new_empty(shape, dtype=torch.int64)


def register() -> None:
    fake("neighbor_pack", _fake_pack)
    fake("kth_neighbor_distance", _fake_kth)
    fake("nearest_neighbors", _fake_nearest)
