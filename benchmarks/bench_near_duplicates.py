"""kth_neighbor_distance among near-duplicates: groups of 400 points that lie 1e-4 apart, a query in each group.

Squared distances near 1e-8 are lost in |q|^2 + |p|^2 - 2 q p, which is how faiss and the eager formula compute them:
here a peer's error is what is measured, and none is refused. Candidates, k and flops are those of `bench_kth_neighbor`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import bar, bench_kth_neighbor
from .work import Candidate, Row, generator, unit_rows

GROUP = 400
APART = 1e-4


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    rng = generator(row)
    centres = unit_rows(rng, -(-row.k // GROUP), row.d)

    def near(group: Tensor) -> Tensor:
        return centres[group] + APART * unit_rows(rng, len(group), row.d)

    return near(torch.arange(row.n) % len(centres)), near(torch.arange(row.k) // GROUP)


def candidates(row: Row) -> list[Candidate]:
    return [c._replace(tolerance=float("inf")) for c in bench_kth_neighbor.candidates(row)]


WORK = replace(
    bench_kth_neighbor.WORK,
    name="near_duplicates",
    rows=bar.rows("near_duplicates"),
    quick=bar.rows("near_duplicates", quick=True),
    inputs=inputs,
    candidates=candidates,
)


def test_near_duplicates(race, row):
    race(WORK, row)
