"""ROBUSTFT_AUTOTUNE=1: times other tiles where a loss meets a row of the table for the first time in a process.

The fastest take the row's place until the process ends, and are printed as the lines to put into configs.py; then
`python -m benchmarks.triton_resources` says what they take. This waits for the device: it is for making the table, not
for training, and repeating a run bit for bit needs a table that stands still.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from robustft.ops.triton import configs
from robustft.ops.triton.configs import Block, Tile

WANTED = os.environ.get("ROBUSTFT_AUTOTUNE") == "1"

_tuned: set[tuple] = set()


def tiles() -> Iterator[Tile]:
    for bm, bn in ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128)):
        for bk in (16, 32, 64):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    yield Tile(bm, bn, bk, warps, stages)


def blocks(tile: Tile) -> Iterator[Block]:
    """Those whose BM and BK divide both sides of the tile."""
    for bm in (32, 64, 128):
        for bd in (64, 128, 256):
            for bk in (16, 32, 64):
                if tile.bm % bm == tile.bn % bm == tile.bm % bk == tile.bn % bk == 0:
                    for warps in (4, 8):
                        for stages in (2, 3, 4):
                            yield Block(bm, bd, bk, warps, stages)


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=10, rep=50)
    except Exception:  # too many registers or too much shared memory: not a candidate
        return float("inf")


def tune(table: dict, key: object, candidates: Iterator, run: Callable[[], object]) -> None:
    """Puts the fastest of the candidates into table[key] unless that row has been tuned, and prints it."""
    name = next(n for n, of in vars(configs).items() if of is table)
    if (name, key) in _tuned:
        return
    _tuned.add((name, key))

    def time(candidate: Tile | Block) -> float:
        table[key] = candidate
        return _milliseconds(run)

    times = {candidate: time(candidate) for candidate in candidates}
    table[key] = min(times, key=times.__getitem__)
    print(f"{name}[{key!r}] = {table[key]}  # {times[table[key]]:.3f} ms")
