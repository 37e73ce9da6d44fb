"""kth_neighbor_distance: each query's squared distance to its k-th nearest point, k = 300.

"robustft" queries a set that was packed before, as faiss's index is filled before; "robustft with packing" starts
from the bare points. Queries and points are unit rows around 1000 common centres. The error is the largest relative
one against float64 differences, of the first 64 queries. Least work: one product, 2 N K D, with K points.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import normalize

import robustft

from . import bar
from .work import Candidate, Row, Work, forward, generator, matmul_precision, ours, peer, unit_rows

NEIGHBORS = 300
CENTRES = 1000
CHECKED = 64
"""Queries whose distances are compared with float64's."""
CHUNK = 1024
"""Queries that the eager formula takes at once."""


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    rng = generator(row)
    centres = unit_rows(rng, CENTRES, row.d)

    def around(count: int) -> Tensor:
        own = centres[torch.randint(CENTRES, (count,), generator=rng)]
        return normalize(own + unit_rows(rng, count, row.d), dim=1)

    return around(row.n), around(row.k)


def reference(queries: Tensor, points: Tensor) -> tuple[Tensor]:
    """(CHECKED,) distances from differences in float64, which do not cancel."""
    differences = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(queries[:CHECKED].double(), points.double(), compute_mode=differences).square()
    return (distances.kthvalue(NEIGHBORS, dim=1).values,)


def relative_error(result: tuple[Tensor], expected: tuple[Tensor]) -> float:
    distances = result[0][:CHECKED].double()
    return ((distances - expected[0]).abs() / expected[0].clamp(min=1e-30)).max().item()


def eager(queries: Tensor, points: Tensor) -> Tensor:
    norms = points.square().sum(1)
    parts = []
    for q in queries.split(CHUNK):
        d = q.square().sum(1, keepdim=True) + norms - 2 * q @ points.T
        parts.append(d.topk(NEIGHBORS, dim=1, largest=False, sorted=False).values.amax(1))
    return torch.cat(parts)


def faiss_search() -> Callable[[Tensor, Tensor], Tensor]:
    """`IndexFlatL2.search` on an index that the first call with some points fills."""
    filled = {}

    def search(queries: Tensor, points: Tensor) -> Tensor:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        if points not in filled:
            filled[points] = faiss.IndexFlatL2(points.shape[1])
            filled[points].add(points.numpy())
        return torch.from_numpy(filled[points].search(queries.numpy(), NEIGHBORS)[0][:, -1].copy())

    return search


def packed(row: Row) -> Candidate:
    """robustft on a `NeighborIndex` that the first call with some points packs."""
    if not hasattr(robustft, "NeighborIndex"):
        return Candidate("robustft", None, "this robustft has no NeighborIndex")
    index = {}

    def search(queries: Tensor, points: Tensor) -> Tensor:
        if points not in index:
            index[points] = robustft.NeighborIndex(points)
        with matmul_precision(row.precision):
            return index[points].kth_distance(queries, NEIGHBORS)

    return Candidate("robustft", forward(search), prepares=True)


def candidates(row: Row) -> list[Candidate]:
    absent = "" if find_spec("faiss") else 'faiss is not installed (pip install "robustft[bench]")'
    return [
        packed(row),
        ours(
            "kth_neighbor_distance",
            row,
            lambda f: forward(lambda q, p: f(q, p, NEIGHBORS)),
            "robustft with packing",
        ),
        peer("eager", row, forward(eager)),
        peer("faiss", row, forward(faiss_search()), missing=absent, prepares=True),
    ]


WORK = Work(
    "kth_neighbor",
    rows=(
        *bar.rows("kth_neighbor"),
        *(Row("kth_neighbor", n, k=20_000) for n in (1, 512, 2048, 8192, 32768)),
        *(Row("kth_neighbor", 2048, d, 20_000) for d in (64, 1024)),
    ),
    quick=bar.rows("kth_neighbor", quick=True),
    inputs=inputs,
    candidates=candidates,
    reference=reference,
    flops=lambda row: 2 * row.n * row.k * row.d,
    formula="2 N K D",
    error=relative_error,
)


def test_kth_neighbor(race, row):
    race(WORK, row)
