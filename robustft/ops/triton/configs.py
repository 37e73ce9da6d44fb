"""Which tiles the kernels use: a static table by architecture, arithmetic and size.

The arithmetic of a product is "half" (bfloat16 or float16 factors), or, of float32 factors, "tf32", "tf32x3" or "ieee".
A matrix is `small` while large tiles would leave most of the processors idle. The work of a program is how much a tile
of a contrastive loss has to hold at a time (1, 2 or 3: the matrices, and, as much as one, labels or uniform targets),
or "classes", "heads" (dual risk) or "scores".

The table, with its evidence, is table.py; `ROBUSTFT_AUTOTUNE=1` makes it anew (autotune.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops.triton import table
from robustft.ops.triton.table import Block, Combine, Tile

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


def stretches(blocks: int, rows: int) -> int:
    """Of `rows` rows in the gradient of class embeddings, which has so many blocks."""
    return max(1, min(SPLIT_BLOCKS // blocks, rows // SPLIT_ROWS))


def panel_rows(m: int, size: int) -> int:
    """Rows of a panel, with kept entries of `size` bytes: a multiple of every tile's height."""
    return max(PANEL_ROWS, PANEL_BYTES // (size * m) // PANEL_ROWS * PANEL_ROWS)


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """Of S. Products of half-precision factors are exact, whatever torch.get_float32_matmul_precision() says."""
    if dtype != torch.float32:
        return "half"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[precision]


def gradient_arithmetic(dtype: torch.dtype, precision: str) -> str:
    """Of G t and G^T x in own kernels. float16 features are widened: their range cannot hold G as it is, and TF32 has
    their precision."""
    return "tf32" if dtype == torch.float16 else arithmetic(dtype, precision)


def _at_most(side: int, size: int) -> int:
    """No more than holds all of a small dimension; 16 is the least that a product takes."""
    return min(side, max(16, 1 << (size - 1).bit_length()))


def tiles(architecture: str, arithmetic: str, work: int | str, small: bool) -> tuple[dict, object]:
    """The table and its row for what computes logits."""
    return _row(INTERPRETER_TILES, table.HALF_TILES, table.FLOAT_TILES, architecture, arithmetic, work, small)


def blocks(architecture: str, arithmetic: str, work: int | str, small: bool) -> tuple[dict, object]:
    """Likewise for a gradient."""
    return _row(INTERPRETER_BLOCKS, table.HALF_BLOCKS, table.FLOAT_BLOCKS, architecture, arithmetic, work, small)


def _row(interpreter: dict, half: dict, floats: dict, architecture: str, arithmetic: str, work: int | str, small: bool):
    if architecture == "interpreter":
        return interpreter, None
    if arithmetic != "half":
        return floats, (arithmetic, work)
    # What is too much for a large tile is left to a small one.
    return half, (architecture, 2, True) if work == 3 else (architecture, work, small)


def tile(d: int, *row) -> Tile:
    """Of matrices of d columns."""
    rows, key = tiles(*row)
    return rows[key]._replace(bk=_at_most(rows[key].bk, d))


def block(d: int, tile: Tile, *row) -> Block:
    """Of d columns, and of logits in such tiles, whose sides its own divide whatever was tuned."""
    rows, key = blocks(*row)
    best = rows[key]
    bm, bk = (min(side, tile.bm, tile.bn) for side in (best.bm, best.bk))
    return best._replace(bm=bm, bk=bk, bd=_at_most(best.bd, d))


def combines(family: str) -> tuple[dict, object]:
    """Of "contrastive" losses and of "classes"."""
    return table.COMBINES, family


def combine(family: str) -> Combine:
    return table.COMBINES[family]


def penalties(architecture: str) -> tuple[dict, object]:
    return table.PENALTIES, "sm_80" if architecture == "interpreter" else architecture


def penalty(k: int, architecture: str) -> tuple[int, int, int]:
    """Rows of logits that a program of the misalignment penalty owns, how many of their k classes it reads at once, and
    its warps."""
    rows, key = penalties(architecture)
    classes = min(rows[key].classes, max(16, 1 << (k - 1).bit_length()))
    return rows[key].logits // classes, classes, rows[key].warps


class Sides(NamedTuple):
    """Of a piece of a matrix."""

    rows: int
    cols: int


class Strip(NamedTuple):
    """Of the kernel of a given S: BM rows, and CHUNKS times BN columns."""

    bm: int
    bn: int
    chunks: int
    warps: int

    @property
    def width(self) -> int:
        return self.bn * self.chunks


class Weights(NamedTuple):
    """Of the kernel of G: CHUNKS times BM rows, and BN columns, whose numbers it then loads once."""

    bm: int
    bn: int
    chunks: int
    warps: int


LIBRARY_FROM = {
    ("sm_80", torch.bfloat16): 8192,  # 8192: 1.60 ms for 2.85; 4096: .93 ms for .82
    ("sm_80", torch.float16): 8192,  # 8192: 1.74 ms for 5.25; 4096: 1.71 ms for 1.38
    ("sm_80", torch.float32): 4096,  # 4096: 3.80 ms for 6.76 (highest); 2048: .93 ms for .46 (medium)
    ("sm_90", torch.bfloat16): 8192,  # 8192: .93 ms for 1.44; 4096: .93 ms for .37
    ("sm_90", torch.float16): 8192,  # 8192: 1.71 ms for 3.01; 4096: 1.71 ms for .76
    ("sm_90", torch.float32): 4096,  # 4096: .93 ms for 1.01 (medium); 2048: .93 ms for .26 (medium)
    ("sm_100", torch.bfloat16): 8192,  # 8192: .93 ms for 1.07; 4096: .93 ms for .30
    ("sm_100", torch.float16): 8192,  # 8192: 1.71 ms for 1.85; 4096: 1.71 ms for .47
    ("sm_100", torch.float32): 8192,  # 8192: 3.73 ms for 10.1 (highest); 4096: .93 ms for .63 (medium)
}
"""Matrices with that many rows and columns have their products made by the device's library: the least power of two
from which on benchmarks/gpu_model.py has it faster, with a teacher and without, at every precision of float32 (a
forward's may not be its backward's). tests/test_gpu_model.py holds one against the other. On an H200 its kernels alone
take less time from 4096 (bfloat16: .20 ms for .32) and from 1024 (float32 at "highest": .15 for .26), but there are
more of them, and the host needs a millisecond to launch them."""
FORWARD_PIECE = Sides(8192, 8192)
"""Whole strips. Smaller ones stay in L2, and nothing is gained: on an H200 (gpu_bodies.json, 32,768 pairs) S in pieces
of 2048 x 4096, 34 MB, took 5.43 ms of products for 5.47 and 3.83 ms of strips for 3.42, and the host 14.6 ms to launch
them all."""
BACKWARD_PIECE = Sides(8192, 8192)
"""A multiple of every tile. G t and G^T x of it are 128 tiles of 128 x 256 each, one for each processor of an H100."""
WEIGHTS_BYTES = 2**29
"""Of G in the backward of a kept S, where a piece holds nothing else. The wider a piece, the less often dx is read and
written again, and the fewer launches the host makes."""
STRIPS = {"less": Strip(32, 128, 16, 4), "most": Strip(32, 128, 16, 8)}
"""Divide both pieces. The most is a teacher's with labels or uniform targets. Either would spill with more rows."""
WEIGHTS = {"less": Weights(32, 128, 8, 4), "most": Weights(32, 128, 8, 8)}
"""Their tiles divide a strip. The most is a teacher's with labels, which would spill in 4 warps."""
FACTORS = 256
"""Samples of a program of factors_kernel, a multiple of its threads."""
FINISH = Block(32, 128, 1, 4, 1)
SIGMOID = Tile(8, 128, 16, 4, 1)
"""Of the sigmoid losses: a program owns BM rows of a piece, and reads BN columns of them at a time."""


def strip(load: int) -> Strip:
    """The load is that of a tile."""
    return STRIPS["most" if load == 3 else "less"]


def weights(load: int) -> Weights:
    """Of the kernel of G; the load is that of a tile."""
    return WEIGHTS["most" if load == 3 else "less"]


def strip_rows(m: int, kinds: int, bm: int) -> int:
    """Rows of a panel whose strips of bm rows have PANEL_BYTES of statistics by columns, `kinds` of them: whole pieces,
    at least one."""
    return max(1, PANEL_BYTES * bm // (4 * kinds * m) // FORWARD_PIECE.rows) * FORWARD_PIECE.rows


def kept_piece(size: int) -> Sides:
    """Of a backward that has what its forward kept; entries of G have `size` bytes."""
    return Sides(BACKWARD_PIECE.rows, WEIGHTS_BYTES // (BACKWARD_PIECE.rows * size))


def by_library(n: int, m: int, factors: Sequence[Tensor], architecture: str) -> bool:
    """Whether the device's library multiplies, of rows that are aligned to 16 bytes. What is kept depends on this, so
    this depends on nothing that may change until the backward, as torch.get_float32_matmul_precision() may."""
    if min(n, m) < LIBRARY_FROM.get((architecture, factors[0].dtype), 2**63):
        return False
    return all(f.shape[1] * f.itemsize % 16 == 0 and f.stride(0) * f.itemsize % 16 == 0 for f in factors)


INTERPRETER_TILES = {None: Tile(32, 32, 32, 1, 1)}
INTERPRETER_BLOCKS = {None: Block(32, 32, 32, 1, 1)}
