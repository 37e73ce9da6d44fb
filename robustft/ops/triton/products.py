"""Large matrices in pieces, whose products the device's library multiplies: at its rate, which no kernel here reaches.

    forward     S of a piece in float32, which strips_kernel reads
    backward    G of a piece (weights_kernel); then G t and G^T x, two products of full depth, added up in float32

So the kernels that stand between are elementwise, and a logit is written once and read once as its exponential, and
once more as G. The numbers are those of the kernels that multiply themselves: S and sums in float32, G in the
features' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """`rows` x `cols` entries of a matrix, from (row0, col0)."""

    row0: int
    col0: int
    rows: int
    cols: int


def pieces(rows: int, cols: int, piece_rows: int, piece_cols: int) -> Iterator[Piece]:
    """All of a matrix, row by row of pieces."""
    for row0 in range(0, rows, piece_rows):
        for col0 in range(0, cols, piece_cols):
            yield Piece(row0, col0, min(piece_rows, rows - row0), min(piece_cols, cols - col0))


def multiply(a: Tensor, b: Tensor, out: Tensor, precision: str, add: bool = False) -> None:
    """out (float32) = a b, or, to add, out + a b. TF32 alone does not keep what "high" promises of float32 factors:
    there each is a sum of two numbers of its precision, of whose four products three count."""
    if out.is_meta:  # kernels are being recorded (launch.py)
        return
    if a.dtype == torch.float32 and precision == "high" and a.is_cuda:
        (a, a_rest), (b, b_rest) = _in_two(a), _in_two(b)
        _multiply(a_rest, b, out, add)
        _multiply(a, b_rest, out, True)
        add = True
    _multiply(a, b, out, add)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if a.dtype != out.dtype and a.is_cuda:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def _in_two(a: Tensor) -> tuple[Tensor, Tensor]:
    """The leading bits of a, as many as TF32 has, and the rest. Inf and NaN have no rest."""
    leading = (a.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return leading, torch.where(leading.isfinite(), a - leading, 0.0)


def bounds(x: Tensor, t: Tensor, pairs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The largest norms of x's and of t's rows, and, of pairs, about the least of their products."""
    x_norm, t_norm = (torch.linalg.vector_norm(f, dim=1, dtype=torch.float32).amax() for f in (x, t))
    return x_norm, t_norm, (x * t).sum(1, dtype=torch.float32).amin() if pairs else None
