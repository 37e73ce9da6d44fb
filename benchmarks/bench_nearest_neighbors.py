"""nearest_neighbors with k near the number of points: distances and indices of 95 % of them, in order.

The peer is `kth_neighbor_distance` with the same k on the same packed points, which orders nothing: its result is the
last column, and the last column alone is compared. Inputs and error are those of `bench_kth_neighbor`. Least work: one
product, 2 N K D, with K points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import robustft

from . import bar, bench_kth_neighbor
from .work import Candidate, Row, Work, forward, matmul_precision, peer

CHECKED = bench_kth_neighbor.CHECKED


def wanted(points: Tensor) -> int:
    return len(points) - len(points) // 20


def reference(queries: Tensor, points: Tensor) -> tuple[Tensor]:
    """(CHECKED,) distances from differences in float64, which do not cancel."""
    differences = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(queries[:CHECKED].double(), points.double(), compute_mode=differences).square()
    return (distances.kthvalue(wanted(points), dim=1).values,)


def candidates(row: Row) -> list[Candidate]:
    index: dict[Tensor, robustft.NeighborIndex] = {}

    def searching(search: Callable[[robustft.NeighborIndex, Tensor, int], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def run(queries: Tensor, points: Tensor) -> Tensor:
            if points not in index:
                index[points] = robustft.NeighborIndex(points)
            with matmul_precision(row.precision):
                return search(index[points], queries, wanted(points))

        return forward(run)

    return [
        Candidate("robustft", searching(lambda of, q, k: of.nearest(q, k).distances[:, -1]), prepares=True),
        peer("kth_neighbor_distance", row, searching(lambda of, q, k: of.kth_distance(q, k)), prepares=True),
    ]


WORK = Work(
    "nearest_neighbors",
    rows=bar.rows("nearest_neighbors"),
    quick=bar.rows("nearest_neighbors", quick=True),
    inputs=bench_kth_neighbor.inputs,
    candidates=candidates,
    reference=reference,
    flops=bench_kth_neighbor.WORK.flops,
    formula="2 N K D",
    error=bench_kth_neighbor.relative_error,
)


def test_nearest_neighbors(race, row):
    race(WORK, row)
