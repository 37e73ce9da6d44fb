"""Exact nearest neighbours among points whose rows are spread over a process group.

    x_r (n_r, D)     the points of rank r, from none to all; those of all ranks, in their order, are one set of N
    q (Q, D)         queries, each rank its own

    the k nearest of q in the set  =  the first k of the min(k, n_r) nearest in each x_r, ordered by (distance, index)

A distance is a function of its query and its point alone, and a stable sort of what the ranks found, joined in their
order, leaves equal ones in the order of their indices: results have the bits of one process that holds all points.

Points stay where they are. Queries go to every rank, and from every rank min(k, n_r) distances and indices a query come
back, in blocks of queries. Where all ranks ask the same queries, each point is met once; where they do not, the queries
of one rank after the other are asked, by all.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustft.ops import arguments, neighbors, ranks
from robustft.ops.neighbors import PackedPoints
from robustft.ops.processes import Processes, naming

BLOCK = 2**21  # distances that a rank receives at a time, 12 bytes each with their indices


def nearest(
    function: str,
    queries: Tensor,
    points: Tensor,
    packed: PackedPoints | None,
    k: Any,
    squared: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """(Q, k) distances of the rank's own queries, ascending, and (Q, k) indices in the set; arguments were checked, but
    for k, which is held against the number of all points."""
    how = Processes(group)
    options = {"k": k, "squared": squared}
    ranks.agree({"function": function, "points": _kind(points), "queries": _kind(queries), **options}, group)
    told = how.all((len(points), len(queries), _digest(queries)))
    sizes = [size for size, _, _ in told]
    k = arguments.check_neighbors(k, sum(sizes))
    widths = [min(k, size) for size in sizes]
    first = sum(sizes[: how.rank])
    alike = all(asked[1:] == told[0][1:] for asked in told)
    found = [(queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device))]
    for asker in (None,) if alike else range(how.count):
        rows = queries.contiguous()
        if asker is not None:
            rows = rows if asker == how.rank else queries.new_empty(told[asker][1], queries.shape[1])
            with naming(how):
                dist.broadcast(rows, src=dist.get_global_rank(group, asker), group=group)
        for part in rows.split(max(1, BLOCK // sum(widths))):
            if len(part):
                distances, indices = _own(part, points, packed, widths[how.rank], squared)
                distances = _brought(distances, widths, asker, how)
                indices = _brought(indices + first, widths, asker, how)
                if asker in (None, how.rank):
                    found.append(_merged(distances, indices, k))
    distances, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances, indices


def _own(queries: Tensor, points: Tensor, packed: PackedPoints | None, k: int, squared: bool) -> tuple[Tensor, Tensor]:
    """What a rank finds among its own points, of which there may be none."""
    if k == 0:
        return queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=points.device)
    return neighbors.nearest(queries, points, packed, k, squared)


def _brought(mine: Tensor, widths: list[int], asker: int | None, how: Processes) -> Tensor:
    """(Q, widths[r]) of every rank r side by side, for the one that asked, or for all."""
    padded = mine.new_zeros(len(mine), max(widths))
    padded[:, : mine.shape[1]] = mine
    parts = [torch.empty_like(padded) for _ in widths]
    with naming(how):
        if asker is None:
            dist.all_gather(parts, padded, group=how.group)
        else:
            assert how.group is not None
            to = dist.get_global_rank(how.group, asker)
            dist.gather(padded, parts if asker == how.rank else None, dst=to, group=how.group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)


def _merged(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :k], indices.gather(1, order[:, :k])


def _kind(rows: Tensor) -> str:
    """What has to be the same on every rank, whatever the number n of its rows."""
    return f"(n, {rows.shape[1]}) {rows.dtype} on {rows.device.type}"


def _digest(queries: Tensor) -> str:
    return hashlib.blake2b(queries.cpu().contiguous().numpy().data).hexdigest()
