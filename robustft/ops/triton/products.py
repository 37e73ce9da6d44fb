"""Large matrices in pieces, whose products the device's library multiplies: at its rate, which no kernel here reaches.

    forward     S of a piece in float32, which strips_kernel reads
    backward    G of a piece (weights_kernel); then G t and G^T x, two products of full depth, added up in float32

So the kernels that stand between are elementwise, and a logit is written once and read once as its exponential, and
once more as G. The numbers are those of the kernels that multiply themselves: S and sums in float32, G in the
features' dtype.

float16 ends at 2^16 and 2^-24, and G of a mean over n pairs is 1 / n and less. So of float16 features G is made of
coefficients that were multiplied by a power of two, `unit`, which takes what G is at most, B, to (2^14, 2^15]; sums are
divided by it. No G overflows; one of at least 2^-28 B keeps the 11 bits that it has in TF32, too, and a smaller one is
off by no more than 2^-39 B. What is kept of such features is in float32 (layouts.py), and needs no unit.
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
    if a.dtype != out.dtype and a.is_cuda and not _sums_in_halves(a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def _sums_in_halves(dtype: torch.dtype) -> bool:
    """Whether a caller's switch has the library add up in float16: what it cannot return in float32 then, and G's sums
    would be out of that range. So factors are widened."""
    return dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation


def _in_two(a: Tensor) -> tuple[Tensor, Tensor]:
    """The leading bits of a, as many as TF32 has, and the rest. Inf and NaN have no rest."""
    leading = (a.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return leading, torch.where(leading.isfinite(), a - leading, 0.0)


def bounds(x: Tensor, t: Tensor, pairs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The largest norms of x's and of t's rows, and, of pairs, about the least of their products."""
    x_norm, t_norm = (torch.linalg.vector_norm(f, dim=1, dtype=torch.float32).amax() for f in (x, t))
    if not pairs:
        return x_norm, t_norm, None
    own = x.float() if x.dtype == torch.float16 else x  # whose products may be out of its range
    return x_norm, t_norm, (own * t).sum(1, dtype=torch.float32).amin()


def largest(*of: Tensor) -> Tensor:
    """The sum of the largest magnitudes of each."""
    return torch.stack([torch.linalg.vector_norm(each, float("inf"), dtype=torch.float32) for each in of]).sum()


def unit(most: Tensor) -> Tensor:
    """The power of two that takes `most` to (2^14, 2^15], of the range of float16; that of 2^-100 if it is less."""
    return torch.exp2(15.0 - torch.ceil(torch.log2(most.clamp(min=2.0**-100))))
