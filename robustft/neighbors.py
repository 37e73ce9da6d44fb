"""A set of points searched many times: prepared once, extended, saved.

    index = NeighborIndex(points)                   # (N, D)
    index.kth_distance(queries, k)                  # (Q,)            robustft.functional.kth_neighbor_distance
    index.nearest(queries, k)                       # (Q, k) twice    robustft.functional.nearest_neighbors

    NeighborIndex(points[rows], group=group)        # each process has some of the points, and searches them all

Results have the same bits whether queries come one at a time or 50,000 together, on any number of threads, and of
processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from robustft.files import load_fitted, refusing, save_fitted
from robustft.functional import Neighbors
from robustft.ops import arguments, neighbors, ranks
from robustft.ops.kinds import checked
from robustft.ops.neighbors import PackedPoints

R = TypeVar("R")


class NeighborIndex:
    """Points (N, D), N at least 1, ready for exact nearest-neighbour searches.

    The points are kept in float32 (float64 if they are), on their device, by reference where they already are so:
    do not change them. Preparing reads them once or twice. float64 queries need a float64 index.
    Memory (`nbytes`): the points; beside them 4 N bytes (8 for float64), at most 8192 of the points again and, for
    float32 on GPUs, on processors with AMX or AVX512_BF16 and (where D is 32 or more) on those with AVX2, 2 N D bytes.
    A search takes up to 80 MB a thread, on a GPU 256 MB (or 4 N bytes).
    Over a process group (`functional.kth_neighbor_distance`) each process makes one of its own points, maybe none, and
    all search together: `nearest` and `kth_distance` are called by every one. The set is that of all points in the
    order of ranks, and so are the indices; the length, `points`, `nbytes` and `save` are of this process's part.
    ValueError or TypeError naming the argument, for NaN and infinity too.
    """

    @checked
    def __init__(self, points: Tensor, *, group: torch.distributed.ProcessGroup | None = None):
        if group is not None:
            ranks.check_group(group)
        self._group = group
        self._packed: PackedPoints | None = None
        self._parts = [self._by_all(lambda: arguments.neighbor_points(points, may_be_empty=group is not None))]
        self._by_all(self._prepare)

    def rank_group(self) -> torch.distributed.ProcessGroup | None:
        """The group whose processes search together."""
        return self._group

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __repr__(self) -> str:
        first = self._parts[0]
        return f"NeighborIndex({len(self)} points, {first.shape[1]} dimensions, {first.dtype}, {first.device})"

    @property
    def points(self) -> Tensor:
        """(N, D), in the order in which they were given."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    @property
    def nbytes(self) -> int:
        """Memory of the points and of what is kept beside them."""
        kept = self._parts if self._packed is None else self._packed
        return sum(tensor.nbytes for tensor in kept)

    @checked
    def add(self, points: Tensor) -> NeighborIndex:
        """Appends points (M, D); returns self. The next search prepares all points again, so add many at once. Of a
        group, they join this process's part, and the other processes need not add any."""
        added = self._by_all(lambda: self._added(points))
        self._parts.append(added)
        self._packed = None
        return self

    def _added(self, points: Tensor) -> Tensor:
        first = self._parts[0]
        added = arguments.neighbor_points(points, may_be_empty=True)
        if added.shape[1] != first.shape[1] or added.device != first.device:
            raise ValueError(
                f"points is {tuple(added.shape)} on {added.device}; expected (M, {first.shape[1]}) on {first.device}"
            )
        if added.dtype == torch.float64 != first.dtype:
            raise TypeError(
                "points is torch.float64, the index float32; build it from float64 points, or convert these"
            )
        neighbors.check_finite("points", added)
        return added.to(first.dtype)

    @checked
    def kth_distance(self, queries: Tensor, k: int, squared: bool = True) -> Tensor:
        """(Q,): distance of each query to its k-th nearest point, as `functional.kth_neighbor_distance`."""
        if self._group is not None:
            return self._of_all("NeighborIndex.kth_distance", queries, k, squared, self._group).distances[:, -1].clone()
        queries = self._checked(queries)
        k = arguments.check_neighbors(k, len(self))
        return neighbors.kth_distance(queries, self.points, self._prepare(), k, squared)

    @checked
    def nearest(self, queries: Tensor, k: int, squared: bool = True) -> Neighbors:
        """The k nearest points of each query, as `functional.nearest_neighbors`."""
        if self._group is not None:
            return self._of_all("NeighborIndex.nearest", queries, k, squared, self._group)
        queries = self._checked(queries)
        k = arguments.check_neighbors(k, len(self))
        return Neighbors(*neighbors.nearest(queries, self.points, self._prepare(), k, squared))

    @checked
    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all. It holds the points alone: what is prepared of them depends
        on the processor, and takes less time to make than to read."""
        save_fitted(Path(path), "NeighborIndex", {}, {"points": self.points})

    @classmethod
    @checked
    def load(cls, path: str | Path, *, group: torch.distributed.ProcessGroup | None = None) -> NeighborIndex:
        """The index that `save` wrote, on the CPU, in memory of its own, whatever becomes of the file. Of a group, the
        file holds this process's part.

        ValueError for another file, OSError where there is none."""
        path = Path(path)
        _, tensors = load_fitted(path, "NeighborIndex")
        with refusing(path, "NeighborIndex"):
            return cls(tensors["points"], group=group)

    def _prepare(self) -> PackedPoints | None:
        if self._group is not None and len(self.points) == 0:
            return None
        if self._packed is None or not neighbors.prepares(self.points):
            self._packed = neighbors.prepare(self.points)
        return self._packed

    def _of_all(
        self, function: str, queries: Tensor, k: int, squared: bool, group: torch.distributed.ProcessGroup
    ) -> Neighbors:
        from robustft.ops import sharded_neighbors

        def prepared() -> tuple[Tensor, Tensor, PackedPoints | None]:
            rows = self._checked(queries)
            neighbors.check_finite("queries", rows)
            return rows, self.points, self._prepare()

        return Neighbors(*sharded_neighbors.nearest(function, *self._by_all(prepared), k, squared, group))

    def _checked(self, queries: Tensor) -> Tensor:
        queries = arguments.neighbor_queries(queries, self.points)
        if queries.dtype == torch.float64 != self.points.dtype:
            raise TypeError(
                "queries is torch.float64, the index float32; build it from float64 points, or convert these"
            )
        return queries.to(self.points.dtype)

    def _by_all(self, check: Callable[[], R]) -> R:
        """What the check gives; an error of one process is raised by all, where they next meet."""
        return check() if self._group is None else ranks.checked(self._group, check)
