"""A set of points searched many times: prepared once, extended, saved.

    index = NeighborIndex(points)                   # (N, D)
    index.kth_distance(queries, k)                  # (Q,)            robustft.functional.kth_neighbor_distance
    index.nearest(queries, k)                       # (Q, k) twice    robustft.functional.nearest_neighbors

Results have the same bits whether queries come one at a time or 50,000 together, on any number of threads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustft.files import load_fitted, refusing, save_fitted
from robustft.functional import Neighbors
from robustft.ops import arguments, neighbors
from robustft.ops.kinds import checked
from robustft.ops.neighbors import PackedPoints


class NeighborIndex:
    """Points (N, D), N at least 1, ready for exact nearest-neighbour searches.

    The points are kept in float32 (float64 if they are), on their device, by reference where they already are so:
    do not change them. Preparing reads them once, at the first search. float64 queries need a float64 index.
    Memory (`nbytes`): the points; beside them 4 N bytes (8 for float64), at most 8192 of the points again and, on
    processors with AMX and on GPUs, 2 N D bytes. A search takes up to 80 MB a thread, on a GPU 256 MB (or 4 N bytes).
    ValueError or TypeError naming the argument, for NaN and infinity too.
    """

    @checked
    def __init__(self, points: Tensor):
        self._parts = [arguments.neighbor_points(points)]
        self._packed: PackedPoints | None = None
        self._prepare()

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
        """Appends points (M, D); returns self. The next search prepares all points again, so add many at once."""
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
        if not added.isfinite().all():
            raise ValueError("points holds NaN or infinity; expected finite numbers")
        self._parts.append(added.to(first.dtype))
        self._packed = None
        return self

    @checked
    def kth_distance(self, queries: Tensor, k: int, squared: bool = True) -> Tensor:
        """(Q,): distance of each query to its k-th nearest point, as `functional.kth_neighbor_distance`."""
        queries, k = self._checked(queries, k)
        return neighbors.kth_distance(queries, self.points, self._prepare(), k, squared)

    @checked
    def nearest(self, queries: Tensor, k: int, squared: bool = True) -> Neighbors:
        """The k nearest points of each query, as `functional.nearest_neighbors`."""
        queries, k = self._checked(queries, k)
        return Neighbors(*neighbors.nearest(queries, self.points, self._prepare(), k, squared))

    @checked
    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all. It holds the points alone: what is prepared of them depends
        on the processor, and takes less time to make than to read."""
        save_fitted(Path(path), "NeighborIndex", {}, {"points": self.points})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> NeighborIndex:
        """The index that `save` wrote, on the CPU, in memory of its own, whatever becomes of the file.

        ValueError for another file, OSError where there is none."""
        path = Path(path)
        _, tensors = load_fitted(path, "NeighborIndex")
        with refusing(path, "NeighborIndex"):
            return cls(tensors["points"])

    def _prepare(self) -> PackedPoints | None:
        if self._packed is None or not neighbors.prepares(self.points):
            self._packed = neighbors.prepare(self.points)
        return self._packed

    def _checked(self, queries: Tensor, k: int) -> tuple[Tensor, int]:
        queries = arguments.neighbor_queries(queries, self.points)
        if queries.dtype == torch.float64 != self.points.dtype:
            raise TypeError(
                "queries is torch.float64, the index float32; build it from float64 points, or convert these"
            )
        return queries.to(self.points.dtype), arguments.check_neighbors(k, len(self))
