"""Which tiles the kernels use: a static table by architecture, arithmetic and size.

The arithmetic of a product is "half" (bfloat16 or float16 factors), or, of float32 factors, "tf32", "tf32x3" or "ieee".
A matrix is `small` while large tiles would leave most of the processors idle. Losses on class logits take the rows of a
contrastive loss that holds as much at a time; so do scores, whose programs keep what they sum.

Evidence. Every entry compiles, offline, without spilling on sm_80 and sm_90 and within the shared memory a block may
have; registers, shared memory and instructions of each are in benchmarks/results/triton_resources.json, written by
`python -m benchmarks.triton_resources` and held by tests/ops/test_triton.py. No entry has been timed: choices follow
from registers alone. What spills: tiles of 128 x 256, and gradient blocks of 128 x 256 (312 bytes of a thread's stack
on sm_90, 56 on sm_80; with BK = 32 and without the diagonal 24).

Prediction (not measured). H100, 800 TFLOP/s of bfloat16, N = 32768, D = 512: the 6 N^2 D flops of a loss take 4.1 ms;
storing and loading its exponentials, 6 bytes a logit, takes 2.2 ms, behind the products; the tile pass writes and reads
0.2 GB of statistics (0.1 ms). A product of 128 x 128 tiles loads 12.5 TB/s from L2 to run at that peak; at 7 TB/s it
reaches 56 % of it. The tile pass, 1.4 ms at peak, then takes 2.5 ms and some of its reductions, which no second block
on the processor hides (255 registers): 3 ms; the gradient, 2.7 ms at peak, 4.9 ms. In all 8 ms, where 6.5 is the goal:
first of all a gradient block of 128 x 256 that does not spill (9.4 TB/s at peak, 75 %: 3.7 ms) is worth having.
`ROBUSTFT_AUTOTUNE=1` times candidates where a loss first meets a row of the table, and prints the lines to put here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Of statistics_kernel and keep_kernel: BM x BN logits, BK of D at a time; GROUP tiles down share columns."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8

    def constants(self, arithmetic: str) -> dict[str, object]:
        sides = {"BM": self.bm, "BN": self.bn, "BK": self.bk, "GROUP": self.group}
        return {"PRECISION": dot_precision(arithmetic), **sides}


class Block(NamedTuple):
    """Of gradient_kernel: BM rows and BD of the D columns of a gradient, BK logits of each row at a time."""

    bm: int
    bd: int
    bk: int
    warps: int
    stages: int


class Combine(NamedTuple):
    """Of combine_kernel: BS samples, BT tiles at a time, BC labels at a time."""

    bs: int = 64
    bt: int = 32
    bc: int = 64
    warps: int = 4


LEAST_TILE = 32
"""No tile's side is smaller."""
SMALL = 3072
"""Matrices with fewer rows and columns are small: 128 x 128 tiles of 1448 rows and columns are one for each of an
H100's processors."""
PANEL_BYTES = 256 * 2**20
"""Of one matrix's exponentials, in a panel of rows."""
PANEL_ROWS = 2048
"""A panel has at least that many rows, since the texts' gradient is read and written once a panel."""

SMALL_CLASSES = 2**20
"""Logits of a small matrix of classes: as many as 64 tiles of 128 x 128."""
SPLIT_BLOCKS = 256
"""Programs that a gradient of class embeddings is split into, about two for each processor, by stretches of rows."""
SPLIT_ROWS = 1024
"""A stretch has at least that many rows."""
SMALL_ROWS = 8192
"""Few rows for scores, whose programs own all classes of their rows: no more than 64 of each of 128 processors."""
PENALTY_WARPS = 4
"""Of a program of the misalignment penalty."""

KEPT = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""What exponentials are kept in, by the features' dtype. float16 would lose bits to bfloat16 and range to float16."""


def kept_pitch(m: int) -> int:
    """Entries from one kept row to the next: a multiple of 64, so that rows are aligned."""
    return -(-m // 64) * 64


def kept_like(n: int, m: int, heads: int, keep: bool, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """Shape and dtype of the records of tiles and of the kept exponentials (tile.py), enough for any tiles."""
    down, across = (-(-size // LEAST_TILE) for size in (n, m))
    tiles = (heads * down * across * 2 if keep else 0,)
    return (tiles, torch.float32), ((heads * n if keep else 0, kept_pitch(m)), KEPT[dtype])


def class_kept_like(n: int, k: int, heads: int, keep: bool, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """Likewise of class logits (class_losses.py): eight numbers a sample, tiles' maxima, exponentials."""
    maxima = heads * -(-k // LEAST_TILE) if keep else 0
    return ((8 + maxima, n), torch.float32), ((n if keep else 0, heads * kept_pitch(k)), KEPT[dtype])


def stretches(blocks: int, rows: int) -> int:
    """Of `rows` rows in the gradient of class embeddings, which has so many blocks."""
    return max(1, min(SPLIT_BLOCKS // blocks, rows // SPLIT_ROWS))


def penalty_block(k: int) -> tuple[int, int]:
    """Rows of logits that a program of the misalignment penalty owns, and how many of their k classes it reads at once:
    2048 numbers, 16 for each of its threads."""
    classes = min(1024, max(16, 1 << (k - 1).bit_length()))
    return 2048 // classes, classes


def panel_rows(m: int, size: int) -> int:
    """Rows of a panel, with kept entries of `size` bytes: a multiple of every tile's height."""
    return max(PANEL_ROWS, PANEL_BYTES // (size * m) // PANEL_ROWS * PANEL_ROWS)


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """Of S. Products of half-precision factors are exact, whatever torch.get_float32_matmul_precision() says."""
    if dtype != torch.float32:
        return "half"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[precision]


def gradient_arithmetic(dtype: torch.dtype, precision: str) -> str:
    """Of G t and G^T x. float16 features are widened: their range cannot hold G, and TF32 has their precision."""
    return "tf32" if dtype == torch.float16 else arithmetic(dtype, precision)


def dot_precision(arithmetic: str) -> str:
    """What tl.dot calls it."""
    return "ieee" if arithmetic == "half" else arithmetic


def _at_most(side: int, size: int) -> int:
    """No more than holds all of a small dimension; 16 is the least that a product takes."""
    return min(side, max(16, 1 << (size - 1).bit_length()))


def tiles(architecture: str, arithmetic: str, load: int, small: bool) -> tuple[dict, object]:
    """The table and its row for a forward. Its load: 1, and 1 more with a teacher, and with labels or smoothing."""
    return _row(INTERPRETER_TILES, HALF_TILES, FLOAT_TILES, architecture, arithmetic, load, small)


def blocks(architecture: str, arithmetic: str, load: int, small: bool) -> tuple[dict, object]:
    """The table of blocks and its row, for the backward."""
    return _row(INTERPRETER_BLOCKS, HALF_BLOCKS, FLOAT_BLOCKS, architecture, arithmetic, load, small)


def _row(interpreter: dict, half: dict, floats: dict, architecture: str, arithmetic: str, load: int, small: bool):
    if architecture == "interpreter":
        return interpreter, None
    if arithmetic != "half":
        return floats, (arithmetic, load)
    # What is too much for a large tile is left to a small one.
    return half, (architecture, min(load, 2), small or load == 3)


def tile(d: int, *row) -> Tile:
    """Of matrices of d columns."""
    table, key = tiles(*row)
    return table[key]._replace(bk=_at_most(table[key].bk, d))


def block(d: int, *row) -> Block:
    table, key = blocks(*row)
    return table[key]._replace(bd=_at_most(table[key].bd, d))


COMBINE = Combine()
INTERPRETER_TILES = {None: Tile(32, 32, 32, 1, 1)}
INTERPRETER_BLOCKS = {None: Block(32, 32, 32, 1, 1)}

# By architecture, load, and whether the matrices are small. A block's BM and BK divide both sides of its tiles.
HALF_TILES = {
    ("sm_80", 1, False): Tile(128, 128, 32, 8, 3),
    ("sm_80", 1, True): Tile(64, 64, 64, 4, 3),
    ("sm_80", 2, False): Tile(128, 64, 32, 8, 3),
    ("sm_80", 2, True): Tile(64, 64, 32, 8, 3),
    ("sm_90", 1, False): Tile(128, 128, 64, 8, 3),
    ("sm_90", 1, True): Tile(64, 64, 64, 4, 3),
    ("sm_90", 2, False): Tile(128, 64, 64, 8, 3),
    ("sm_90", 2, True): Tile(64, 64, 64, 8, 3),
    ("sm_100", 1, False): Tile(128, 64, 64, 8, 3),
    ("sm_100", 1, True): Tile(64, 64, 64, 4, 3),
    ("sm_100", 2, False): Tile(128, 64, 64, 8, 3),
    ("sm_100", 2, True): Tile(64, 64, 64, 8, 3),
}
HALF_BLOCKS = {
    ("sm_80", 1, False): Block(128, 128, 32, 8, 3),
    ("sm_80", 1, True): Block(64, 64, 32, 4, 3),
    ("sm_80", 2, False): Block(64, 128, 32, 4, 3),
    ("sm_80", 2, True): Block(64, 64, 32, 4, 3),
    ("sm_90", 1, False): Block(128, 128, 64, 8, 3),
    ("sm_90", 1, True): Block(64, 64, 64, 4, 3),
    ("sm_90", 2, False): Block(64, 128, 32, 4, 3),
    ("sm_90", 2, True): Block(64, 64, 32, 4, 3),
    ("sm_100", 1, False): Block(64, 128, 32, 4, 3),
    ("sm_100", 1, True): Block(64, 64, 32, 4, 3),
    ("sm_100", 2, False): Block(64, 128, 32, 4, 3),
    ("sm_100", 2, True): Block(64, 64, 32, 4, 3),
}
# float32 factors on any architecture, of any size.
FLOAT_TILES = {
    ("tf32", 1): Tile(64, 64, 32, 4, 3),
    ("tf32", 2): Tile(64, 64, 32, 8, 3),
    ("tf32", 3): Tile(64, 64, 32, 8, 3),
    ("tf32x3", 1): Tile(64, 64, 32, 8, 2),
    ("tf32x3", 2): Tile(32, 64, 32, 8, 2),
    ("tf32x3", 3): Tile(32, 64, 32, 8, 2),
    ("ieee", 1): Tile(64, 64, 16, 8, 2),
    ("ieee", 2): Tile(64, 64, 16, 8, 2),
    ("ieee", 3): Tile(64, 64, 16, 8, 2),
}
FLOAT_BLOCKS = {
    ("tf32", 1): Block(64, 64, 32, 4, 3),
    ("tf32", 2): Block(64, 64, 32, 4, 3),
    ("tf32", 3): Block(32, 64, 32, 4, 3),
    ("tf32x3", 1): Block(64, 64, 32, 8, 2),
    ("tf32x3", 2): Block(32, 64, 16, 4, 2),
    ("tf32x3", 3): Block(32, 32, 16, 4, 2),
    ("ieee", 1): Block(64, 64, 16, 8, 2),
    ("ieee", 2): Block(32, 32, 16, 4, 2),
    ("ieee", 3): Block(32, 64, 16, 4, 2),
}
