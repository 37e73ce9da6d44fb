"""Nearest neighbours by whichever body computes them: what `functional` and `NeighborIndex` share.

The compiled searches (csrc/cpu/neighbors/, csrc/cuda/neighbors.cu) take points prepared once, for many searches.

Non-finite inputs are refused by the compiled bodies without a pass of its own: preparing the points notices one, and a
query that holds one gets NaN distances. While torch.compile traces, where nothing can be raised for a value, points
that are not finite fail in the operator and queries keep their NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops import arguments, reference
from robustft.ops.dispatch import body_of
from robustft.ops.registry import Call, Op, Source, accumulation_dtype, register


class PackedPoints(NamedTuple):
    """Points (n, d) and what csrc/cpu/neighbors/pack.cpp makes of them."""

    points: Tensor
    centre: Tensor
    bias: Tensor
    filter: Tensor
    sample: Tensor
    bounds: Tensor

    @property
    def finite(self) -> bool:
        return not bool(self.bounds[0].isnan())


FILTERED = 128
"""A single search of fewer queries is faster without a filter in fixed point."""


def sample_size(n: int) -> int:
    """How many points a search looks at to guess where to start; small sets are searched without."""
    return 0 if n < 8192 else min(8192, max(2048, n // 64))


def pack(points: Tensor, filter: bool = True) -> PackedPoints:
    """Reads the points once or twice; they are referred to, not copied. A filter in fixed point is made only if asked
    for: it takes the time that it spares on `FILTERED` queries."""
    return PackedPoints(points, *torch.ops.robustft.neighbor_pack(points, sample_size(len(points)), filter))


def prepares(points: Tensor) -> bool:
    """Whether a compiled search is used. On a GPU tensor cores filter float32; float64 is left to the reference."""
    if points.is_cuda and points.dtype == torch.float64:
        return False
    if not (torch.compiler.is_compiling() or arguments.has_numbers(points)):
        return False  # how much is prepared depends on the processor
    return body_of("neighbor_pack", points) != "reference"


def prepare(points: Tensor, filter: bool = True) -> PackedPoints | None:
    """The points prepared for the compiled search, or None where the reference searches."""
    if not prepares(points):
        if _looked_at(points):
            check_finite("points", points)
        return None
    packed = pack(points, filter)
    if _looked_at(points):
        _refuse("points", not packed.finite)
    return packed


def kth_distance(queries: Tensor, points: Tensor, packed: PackedPoints | None, k: int, squared: bool) -> Tensor:
    """(Q,): the k-th smallest distance."""
    if packed is None:
        distances = reference.kth_neighbor_distance(queries, points, k, squared)
    else:
        distances = torch.ops.robustft.kth_neighbor_distance(queries, *packed, k, squared)
    return _checked(distances)


def nearest(
    queries: Tensor, points: Tensor, packed: PackedPoints | None, k: int, squared: bool
) -> tuple[Tensor, Tensor]:
    """(Q, k) distances, ascending, and (Q, k) indices."""
    if packed is None:
        distances, indices = reference.nearest_neighbors(queries, points, k, squared)
    else:
        distances, indices = torch.ops.robustft.nearest_neighbors(queries, *packed, k, squared)
    return _checked(distances), indices


def _checked(distances: Tensor) -> Tensor:
    # Of finite points only a query that is not finite is NaN away.
    if _looked_at(distances):
        _refuse("queries", bool(distances.isnan().any()))
    return distances


def _looked_at(values: Tensor) -> bool:
    return not torch.compiler.is_compiling() and arguments.has_numbers(values)


def check_finite(name: str, values: Tensor) -> None:
    """ValueError for NaN and infinity."""
    _refuse(name, not bool(values.isfinite().all()))


def _refuse(name: str, condition: bool) -> None:
    if condition:
        raise ValueError(f"{name} holds NaN or infinity; expected finite numbers")


def _fake_pack(points, samples, filter=True):
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


def _sample_search(source: Source) -> Iterator[tuple]:
    queries, points = source.normal(5, 6), source.normal(40, 6)
    yield queries, *pack(points), 3, False


def _calls(source: Source) -> Iterator[Call]:
    yield Call((source.normal(5, 6), source.normal(40, 6), 3), {"squared": False})


_WIDE = (torch.float64, torch.float32)  # the public functions widen the others
register(Op("neighbor_pack", _fake_pack, lambda source: [(source.normal(40, 6), 20)], dtypes=_WIDE))
for _name, _fake in (("kth_neighbor_distance", _fake_kth), ("nearest_neighbors", _fake_nearest)):
    register(Op(_name, _fake, _sample_search, kernel="neighbor_pack", public=_calls, dtypes=_WIDE))
