"""Points that several processes have some rows of are searched as one process searches them all, to the bit."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.distributed as dist
from targets import exhaustive

import robustft
from robustft import NeighborIndex
from robustft import functional as rf

by_process = processes.by_process  # a fixture of this file's tests

CUTS = {2: (0, 31, 90), 3: (0, 60, 60, 90)}  # of the points; a process may have none of them
ASKED = {2: (0, 4, 11), 3: (0, 5, 5, 11)}  # of the queries
K = (7, 40, 90)  # more than some have, and all


def points(kind):
    """(90, 5) points and (11, 5) queries: with many at one distance, on every process; or with none nearer than what
    float32 holds."""
    generator = torch.Generator().manual_seed(0)
    if kind == "far":
        return torch.randn(90, 5, generator=generator) * 1e22, torch.randn(11, 5, generator=generator)
    drawn = torch.randint(-1, 2, (101, 5), generator=generator)
    return tuple(drawn.to(torch.float64 if kind == "double" else torch.float32).split((90, 11)))


def found(points, queries, group=None):
    """By k what an index and the functions find."""
    index = NeighborIndex(points, group=group)
    results = []
    for k in K:
        results += [*index.nearest(queries, k), *rf.nearest_neighbors(queries, points, k, squared=False, group=group)]
        results += [index.kth_distance(queries, k, squared=False)]
        results += [rf.kth_neighbor_distance(queries, points, k, group=group)]
    return results


def mine(rows, cuts, rank):
    return rows[slice(*cuts[dist.get_world_size()][rank : rank + 2])]


def search(rank, kind, backend):
    """Of queries that all processes have, and of the process's own; in blocks of a few queries, too."""
    from robustft.ops import sharded_neighbors

    x, queries = points(kind)
    x = mine(x, CUTS, rank)
    with robustft.backend(backend):
        shared = found(x, queries, dist.group.WORLD)
        own = found(x, mine(queries, ASKED, rank), dist.group.WORLD)
        sharded_neighbors.BLOCK = 300
        return shared, own, [*rf.nearest_neighbors(queries, x, 40, group=dist.group.WORLD)]


CASES = [(2, "ties", "auto"), *exhaustive((3, "double", "auto"), (3, "ties", "reference"), (3, "far", "auto"))]


@pytest.mark.parametrize(("world", "kind", "backend"), CASES)
def test_processes_find_what_one_finds(world, kind, backend, by_process):
    x, queries = points(kind)
    with robustft.backend(backend):
        expected = found(x, queries)
    ends = expected[6 * K.index(40)][:, -2:]  # distances there that are one, or infinite
    assert (ends[:, 0] == ends[:, 1]).any() and bool(ends.isinf().all()) == (kind == "far")
    for rank, (shared, own, in_blocks) in enumerate(by_process(world, search, kind, backend)):
        asked = slice(*ASKED[world][rank : rank + 2])
        for alone, together, for_itself in zip(expected, shared, own, strict=True):
            assert torch.equal(together, alone) and torch.equal(for_itself, alone[asked])
        for alone, together in zip(expected[6 * K.index(40) :], in_blocks, strict=False):
            assert torch.equal(together, alone)


def added_and_refused(rank):
    """What is found after a process has added points, and what each says of arguments that do not go together."""
    group, (x, queries) = dist.group.WORLD, points("ties")
    index = NeighborIndex(mine(x, CUTS, rank), group=group)
    if rank == 0:
        index.add(x[:3])
    words = []
    bad = queries.clone()
    bad[3, 2] = torch.nan
    for call in (
        lambda: index.nearest(queries, 94),
        lambda: index.nearest(bad if rank else queries, 3),
        lambda: index.nearest(queries, 3 + rank),
        lambda: index.nearest(queries[:, : 5 - rank], 3),
        lambda: index.kth_distance(queries, 3) if rank else index.nearest(queries, 3),
        lambda: rf.nearest_neighbors(queries, (bad if rank else queries), 3, group=group),
        lambda: rf.nearest_neighbors(queries, queries[:0], 1, group=group),
        lambda: index.nearest(queries, "3" if rank else 3),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        words.append(str(error.value))
    return [*index.nearest(queries, 50)], words


@pytest.mark.exhaustive
def test_what_does_not_go_together_is_refused_by_all(by_process):
    x, queries = points("ties")
    expected = NeighborIndex(torch.cat((x[:31], x[:3], x[31:]))).nearest(queries, 50)
    for together, words in by_process(2, added_and_refused):
        assert all(map(torch.equal, together, expected))
        for said, part in zip(
            words,
            (
                "k is 94; expected an integer in [1, 93]",
                "rank 1 failed with ValueError: queries holds NaN",
                "k differs between ranks: rank 0: 3; rank 1: 4",
                "queries has 4 dimensions; expected 5",
                "the ranks are at different calls: rank 0: NeighborIndex.nearest; rank 1: NeighborIndex.kth_distance",
                "points holds NaN or infinity",
                "k is 1; expected an integer in [1, 0]",
                "k is '3'; expected an integer",
            ),
            strict=True,
        ):
            assert part in said
