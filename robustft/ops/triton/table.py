"""The static table of tiles, by architecture, arithmetic, work and size. configs.py says who takes which row.

Evidence. Every entry compiles, offline, within the shared memory a block may have, and by Triton 3.9 without spilling;
3.6 spills 24 bytes of a thread's stack in sm_90's large half tile of work 1, and up to 16 in three gradients of
float32. Registers, shared memory and instructions of each are in benchmarks/results/triton_resources.json, written by
`python -m benchmarks.triton_resources` and held by tests/ops/test_triton.py. No entry has been tuned: choices follow
from registers alone. What would spill: tiles of 128 x 256, and gradient blocks of 128 x 256 (312 bytes on sm_90, 56 on
sm_80; with BK = 32 and without the diagonal 24); on sm_100 a teacher's tiles with BK = 64; two heads' blocks of 32 x 64
in TF32.

Measured on an H200 (benchmarks/results/gpu_bodies.json; 785 TFLOP/s of bfloat16, N = 32768, D = 512): the tile pass
takes 5.7 ms, where its product alone takes 1.4, and the gradient 12.8, where its two take 2.8. Before that they were
predicted at 3 and 4.9: shuffles and the gradient's instructions, G made once for each 128 columns, were left out. Hence
the library's products from 8192 pairs on (configs.py, products.py). Below, the host takes longer to launch than the
kernels take.

Half-precision factors: by architecture, work (configs.py) and whether the matrices are small. float32 factors, on any
architecture and of any size: by arithmetic and work. Combining: by family of losses. The penalty: by architecture. A
block's BM and BK divide both sides of the tiles that it reads. What a forward keeps is by tile, and
torch.get_float32_matmul_precision() may be another when the backward reads it: float32 tiles of one work have the same
sides (of classes, the same BN) in every arithmetic.

`ROBUSTFT_AUTOTUNE=1` times candidates where a loss first meets a row, and prints, when the process ends, all that
follows the line of dashes below as it should be on that device.
"""

from __future__ import annotations

from typing import NamedTuple


def dot_precision(arithmetic: str) -> str:
    """What tl.dot calls it."""
    return "ieee" if arithmetic == "half" else arithmetic


class Tile(NamedTuple):
    """Of the kernels of statistics and scores: BM x BN logits, BK of D at a time; GROUP tiles down share columns."""

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
    """Of gradient kernels: BM rows and BD of the D columns of a gradient, BK logits of each row at a time."""

    bm: int
    bd: int
    bk: int
    warps: int
    stages: int


class Combine(NamedTuple):
    """Of combining kernels: BS samples, BT tiles at a time, BC labels at a time."""

    bs: int
    bt: int
    bc: int
    warps: int


class Penalty(NamedTuple):
    """Of the misalignment penalty's kernels: how many logits of some rows are read at once, of one row at most."""

    logits: int
    classes: int
    warps: int


# ----------------------------------------------------------------------------------------------------------------------
HALF_TILES = {
    ("sm_80", 1, False): Tile(128, 128, 32, 8, 3),
    ("sm_80", 1, True): Tile(64, 64, 64, 4, 3),
    ("sm_80", 2, False): Tile(128, 64, 32, 8, 3),
    ("sm_80", 2, True): Tile(64, 64, 32, 8, 3),
    ("sm_80", "classes", False): Tile(128, 64, 32, 8, 3),
    ("sm_80", "classes", True): Tile(64, 64, 32, 8, 3),
    ("sm_80", "heads", False): Tile(128, 64, 32, 8, 3),
    ("sm_80", "heads", True): Tile(64, 64, 32, 8, 3),
    ("sm_80", "scores", False): Tile(128, 64, 32, 8, 3),
    ("sm_80", "scores", True): Tile(64, 64, 32, 8, 3),
    ("sm_90", 1, False): Tile(128, 128, 64, 8, 3),
    ("sm_90", 1, True): Tile(64, 64, 64, 4, 3),
    ("sm_90", 2, False): Tile(128, 64, 64, 8, 3),
    ("sm_90", 2, True): Tile(64, 64, 64, 8, 3),
    ("sm_90", "classes", False): Tile(128, 64, 64, 8, 3),
    ("sm_90", "classes", True): Tile(64, 64, 64, 8, 3),
    ("sm_90", "heads", False): Tile(128, 64, 64, 8, 3),
    ("sm_90", "heads", True): Tile(64, 64, 64, 8, 3),
    ("sm_90", "scores", False): Tile(128, 64, 64, 8, 3),
    ("sm_90", "scores", True): Tile(64, 64, 64, 8, 3),
    ("sm_100", 1, False): Tile(128, 64, 64, 8, 3),
    ("sm_100", 1, True): Tile(64, 64, 64, 4, 3),
    ("sm_100", 2, False): Tile(128, 64, 32, 8, 3),
    ("sm_100", 2, True): Tile(64, 64, 64, 8, 3),
    ("sm_100", "classes", False): Tile(128, 64, 64, 8, 3),
    ("sm_100", "classes", True): Tile(64, 64, 64, 8, 3),
    ("sm_100", "heads", False): Tile(128, 64, 64, 8, 3),
    ("sm_100", "heads", True): Tile(64, 64, 64, 8, 3),
    ("sm_100", "scores", False): Tile(128, 64, 64, 8, 3),
    ("sm_100", "scores", True): Tile(64, 64, 64, 8, 3),
}
HALF_BLOCKS = {
    ("sm_80", 1, False): Block(128, 128, 32, 8, 3),
    ("sm_80", 1, True): Block(64, 64, 32, 4, 3),
    ("sm_80", 2, False): Block(64, 128, 32, 4, 3),
    ("sm_80", 2, True): Block(64, 64, 32, 4, 3),
    ("sm_80", "classes", False): Block(64, 128, 32, 4, 3),
    ("sm_80", "classes", True): Block(64, 64, 32, 4, 3),
    ("sm_80", "heads", False): Block(64, 128, 32, 4, 3),
    ("sm_80", "heads", True): Block(64, 64, 32, 4, 3),
    ("sm_90", 1, False): Block(128, 128, 64, 8, 3),
    ("sm_90", 1, True): Block(64, 64, 64, 4, 3),
    ("sm_90", 2, False): Block(64, 128, 32, 4, 3),
    ("sm_90", 2, True): Block(64, 64, 32, 4, 3),
    ("sm_90", "classes", False): Block(64, 128, 32, 4, 3),
    ("sm_90", "classes", True): Block(64, 64, 32, 4, 3),
    ("sm_90", "heads", False): Block(64, 128, 32, 4, 3),
    ("sm_90", "heads", True): Block(64, 64, 32, 4, 3),
    ("sm_100", 1, False): Block(64, 128, 32, 4, 3),
    ("sm_100", 1, True): Block(64, 64, 32, 4, 3),
    ("sm_100", 2, False): Block(64, 128, 32, 4, 3),
    ("sm_100", 2, True): Block(64, 64, 32, 4, 3),
    ("sm_100", "classes", False): Block(64, 128, 32, 4, 3),
    ("sm_100", "classes", True): Block(64, 64, 32, 4, 3),
    ("sm_100", "heads", False): Block(64, 128, 32, 4, 3),
    ("sm_100", "heads", True): Block(64, 64, 32, 4, 3),
}
FLOAT_TILES = {
    ("tf32", 1): Tile(64, 64, 32, 4, 3),
    ("tf32", 2): Tile(32, 64, 32, 8, 3),
    ("tf32", 3): Tile(32, 64, 32, 8, 3),
    ("tf32", "classes"): Tile(64, 64, 32, 8, 3),
    ("tf32", "heads"): Tile(64, 64, 32, 8, 3),
    ("tf32", "scores"): Tile(64, 64, 32, 8, 3),
    ("tf32x3", 1): Tile(64, 64, 32, 8, 2),
    ("tf32x3", 2): Tile(32, 64, 32, 8, 2),
    ("tf32x3", 3): Tile(32, 64, 32, 8, 2),
    ("tf32x3", "classes"): Tile(32, 64, 32, 8, 2),
    ("tf32x3", "heads"): Tile(32, 64, 32, 8, 2),
    ("tf32x3", "scores"): Tile(32, 64, 32, 8, 2),
    ("ieee", 1): Tile(64, 64, 16, 8, 2),
    ("ieee", 2): Tile(32, 64, 16, 8, 2),
    ("ieee", 3): Tile(32, 64, 16, 8, 2),
    ("ieee", "classes"): Tile(64, 64, 16, 8, 2),
    ("ieee", "heads"): Tile(64, 64, 16, 8, 2),
    ("ieee", "scores"): Tile(64, 64, 16, 8, 2),
}
FLOAT_BLOCKS = {
    ("tf32", 1): Block(64, 64, 32, 4, 3),
    ("tf32", 2): Block(32, 64, 16, 4, 3),
    ("tf32", 3): Block(32, 64, 32, 4, 3),
    ("tf32", "classes"): Block(32, 64, 32, 4, 3),
    ("tf32", "heads"): Block(32, 32, 32, 4, 3),
    ("tf32x3", 1): Block(64, 64, 32, 8, 2),
    ("tf32x3", 2): Block(32, 64, 16, 4, 2),
    ("tf32x3", 3): Block(32, 32, 16, 4, 2),
    ("tf32x3", "classes"): Block(32, 32, 16, 4, 2),
    ("tf32x3", "heads"): Block(32, 32, 16, 4, 2),
    ("ieee", 1): Block(64, 64, 16, 8, 2),
    ("ieee", 2): Block(32, 32, 16, 4, 2),
    ("ieee", 3): Block(32, 64, 16, 4, 2),
    ("ieee", "classes"): Block(32, 64, 16, 4, 2),
    ("ieee", "heads"): Block(32, 64, 16, 4, 2),
}
COMBINES = {
    "contrastive": Combine(64, 16, 64, 4),
    "classes": Combine(64, 32, 64, 4),
}
PENALTIES = {
    "sm_80": Penalty(2048, 1024, 4),
    "sm_90": Penalty(2048, 1024, 4),
    "sm_100": Penalty(2048, 1024, 4),
}
