"""ROBUSTFT_AUTOTUNE=1: times other rows where an operator meets one of the table for the first time in a process.

The fastest takes the row's place until the process ends. Then the whole table is printed as it belongs below the dashes
of table.py; after that `python -m benchmarks.triton_resources` says what its rows take. This waits for the device: it
is for making the table, not for training, and repeating a run bit for bit needs a table that stands still.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from robustft.ops.accelerator import INTERPRETED
from robustft.ops.triton import table
from robustft.ops.triton.table import Block, Combine, Penalty, Tile

WANTED = os.environ.get("ROBUSTFT_AUTOTUNE") == "1" and not INTERPRETED
TABLES = ("HALF_TILES", "HALF_BLOCKS", "FLOAT_TILES", "FLOAT_BLOCKS", "COMBINES", "PENALTIES")

_tuned: set[tuple[str, object]] = set()


def _sums(rows: int, columns: int, warps: int) -> bool:
    """Whether a product's sums are few enough for a thread's registers, and enough to be worth the threads."""
    return 8 <= rows * columns // (32 * warps) <= 128


def tiles(row: tuple[dict, object]) -> Iterator[Tile]:
    """Those that may take the row's place. float32's keep its sides, which other arithmetics share (table.py)."""
    rows, key = row
    for bm, bn in ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128)):
        if rows is table.FLOAT_TILES and (bm, bn) != (rows[key].bm, rows[key].bn):
            continue
        for bk in (16, 32, 64):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    if _sums(bm, bn, warps):
                        yield Tile(bm, bn, bk, warps, stages)


def blocks(tile: Tile) -> Iterator[Block]:
    """Those whose BM and BK divide both sides of the tile."""
    for bm in (32, 64, 128):
        for bd in (32, 64, 128, 256):
            for bk in (16, 32, 64):
                for warps in (4, 8):
                    for stages in (2, 3, 4):
                        if max(bm, bk) <= min(tile.bm, tile.bn) and _sums(bm, bd, warps):
                            yield Block(bm, bd, bk, warps, stages)


def combines() -> Iterator[Combine]:
    for bs in (32, 64, 128):
        for bt in (8, 16, 32):
            for warps in (2, 4, 8):
                yield Combine(bs, bt, 64, warps)


def penalties() -> Iterator[Penalty]:
    for logits in (1024, 2048, 4096):
        for classes in (256, 512, 1024):
            for warps in (2, 4, 8):
                yield Penalty(logits, classes, warps)


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=10, rep=50)
    except Exception:  # too many registers, or too much shared memory or memory: not a candidate
        return float("inf")


def tune(row: tuple[dict, object], candidates: Iterable[NamedTuple], run: Callable[[], object]) -> None:
    """Puts the fastest of the candidates, and of what is there, into the table's row; once a row."""
    rows, key = row
    name = next(name for name in TABLES if getattr(table, name) is rows)
    if (name, key) in _tuned:
        return
    _tuned.add((name, key))
    _print_at_exit()

    def time(candidate: NamedTuple) -> float:
        rows[key] = candidate
        return _milliseconds(run)

    before = rows[key]
    times = {candidate: time(candidate) for candidate in dict.fromkeys((before, *candidates))}
    rows[key] = best = min(times, key=times.__getitem__)  # the first of several: what was there
    print(f"{name}[{key!r}] = {_literal(best)}  # {times[best]:.3f} ms, before {times[before]:.3f}", flush=True)


def _literal(row: NamedTuple) -> str:
    """As table.py writes it, without defaults at the end."""
    values = [value for name, value in row._asdict().items() if value != row._field_defaults.get(name)]
    return f"{type(row).__name__}({', '.join(map(repr, values))})"


def text() -> str:
    """All tables, as table.py writes them."""
    lines = []
    for name in TABLES:
        rows = (f"    {key!r}: {_literal(row)}," for key, row in getattr(table, name).items())
        lines += [f"{name} = {{", *(row.replace("'", '"') for row in rows), "}"]
    return "\n".join(lines) + "\n"


@cache
def _print_at_exit() -> None:
    atexit.register(lambda: print(text(), end="", flush=True))
