"""Nearest neighbours by whichever body computes them: what `functional` and `NeighborIndex` share.

Non-finite inputs are refused by the compiled bodies without a pass of its own: preparing the points notices one, and a
query that holds one gets NaN distances. While torch.compile traces, where nothing can be raised for a value, points
that are not finite fail in the operator and queries keep their NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustft.ops import reference
from robustft.ops.dispatch import use_native
from robustft.ops.native.neighbors import PackedPoints, pack


def prepare(points: Tensor) -> PackedPoints | None:
    """The points prepared for the compiled search, or None where the reference searches."""
    if not use_native("neighbor_pack", points.device):
        if not torch.compiler.is_compiling():
            _refuse("points", not bool(points.isfinite().all()))
        return None
    packed = pack(points)
    if not torch.compiler.is_compiling():
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
    if not torch.compiler.is_compiling():
        _refuse("queries", bool(distances.isnan().any()))
    return distances


def _refuse(name: str, condition: bool) -> None:
    if condition:
        raise ValueError(f"{name} holds NaN or infinity; expected finite numbers")
