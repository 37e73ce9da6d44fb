"""The kernels on S = x t^T (csrc/cpu/similarity/, triton/contrastive.py), and the names of what they compute.

Statistics of each row and column of S, from which losses are made, and the gradient that coefficients of rows and
columns lead to. Tensors hold them as rows, in the order of the fields here and of the enumerations in
csrc/cpu/similarity/similarity.h; they are unpacked where they enter Python: `Statistics(*row)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops import layouts, registry
from robustft.ops.registry import Op, Source, accumulation_dtype, contiguous_like, register


class Statistics(NamedTuple):
    """Of the rows of S, each (n,), or of its columns, each (m,). With z = s S and p its softmax:"""

    max: Tensor
    """The largest S."""
    log_sum: Tensor
    """log sum exp(s (S - max))."""
    gap: Tensor
    """sum p (S - max)."""
    target: Tensor
    """sum S over entries of the same label."""
    total: Tensor
    """sum S; 0 where it was not asked for."""
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    teacher_gap: Tensor | None = None
    """sum pt (S - max), pt the softmax of the teacher's S, max the student's."""

    def rows(self) -> Tensor:
        """(5, n), with a teacher (8, n)."""
        return torch.stack([field for field in self if field is not None])


class Softmaxes(NamedTuple):
    """What of `Statistics` the backward needs: p = exp(s (S - max) - log_sum)."""

    max: Tensor
    log_sum: Tensor
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None

    def rows(self) -> Tensor:
        """(2, n), with a teacher (4, n): a copy that lets the rest of the statistics go."""
        return torch.stack([field for field in self if field is not None])


class Coefficients(NamedTuple):
    """Of rows (or columns) in G = a p - b [same label] - u - c pt, summed over both sides; dx = s G t, dt = s G^T x."""

    max: Tensor
    log_sum: Tensor
    softmax: Tensor
    """a"""
    target: Tensor
    """b"""
    uniform: Tensor
    """u"""
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    teacher: Tensor | None = None
    """c"""

    def rows(self) -> Tensor:
        """(5, n), with a teacher (8, n)."""
        return torch.stack([field for field in self if field is not None])


class Matrices(NamedTuple):
    """The factors of S (n, m), and of the teacher's if there is one, each with its scale."""

    x: Tensor
    t: Tensor
    scale: Tensor
    x_teacher: Tensor | None = None
    t_teacher: Tensor | None = None
    teacher_scale: Tensor | None = None


def statistics(
    of: Matrices, x_labels: Tensor, t_labels: Tensor, totals: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of `Statistics` of both sides, and the records and exponentials that are kept (layouts.py)."""
    x, t, scale, *teacher = of
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.similarity_statistics(x, t, scale, x_labels, t_labels, *teacher, totals, keep, precision)


def gradient(
    of: Matrices, x_labels: Tensor, t_labels: Tensor, row: Tensor, col: Tensor, kept: tuple[Tensor, ...], totals: bool
) -> tuple[Tensor, Tensor]:
    """dx and dt, from rows of `Coefficients` of both sides and what `statistics` kept."""
    x, t, scale, *teacher = of
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.similarity_gradient(
        x, t, scale, x_labels, t_labels, *teacher, row, col, *kept, totals, precision
    )


def fake_kept(op: str, x: Tensor, t: Tensor, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    """What only a device's own backward reads."""
    body = registry.body(op, x.device, x.dtype)
    return layouts.similarities(body, x.shape[0], t.shape[0], heads, keep, x.dtype).like(x)


def fake_gradient(x: Tensor, t: Tensor, *_) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(t)


def _fake_statistics(x, t, scale, x_labels, t_labels, xt, tt, st, totals, keep, precision):
    kinds, heads = (5, 1) if xt is None else (8, 2)
    dtype = accumulation_dtype(x.dtype)
    row, col = (x.new_empty(kinds, side.shape[0], dtype=dtype) for side in (x, t))
    return row, col, *fake_kept("similarity_statistics", x, t, heads, keep)


def _rectangles(source: Source) -> Iterator[tuple]:
    """Seven rows and nine columns of S, without and with a teacher."""
    n, m = 7, 9
    x, t, scale = source.features(n, 5, False), source.features(m, 5, False), source.scale(7.0, False)
    labels = source.labels(n, 4), source.labels(m, 4)
    yield x, t, scale, *labels, None, None, None
    yield x, t, scale, *labels, source.features(n, 6, False), source.features(m, 6, False), source.scale(5.0, False)


def _sample_statistics(source: Source) -> Iterator[tuple]:
    for matrices in _rectangles(source):
        yield from ((*matrices, totals, keep, "highest") for totals, keep in ((True, False), (False, True)))


def _sample_gradient(source: Source) -> Iterator[tuple]:
    for *matrices, totals, keep, precision in _sample_statistics(source):
        row, col, *kept = torch.ops.robustft.similarity_statistics(*matrices, totals, keep, precision)
        sides = []
        for of in (Statistics(*row), Statistics(*col)):
            a, b, u, c = source.uniform(4, len(of.max)).to(row.dtype)
            taught = () if of.teacher_gap is None else (of.teacher_max, of.teacher_log_sum, c)
            sides.append(Coefficients(of.max, of.log_sum, a, b, u, *taught).rows())
        yield *matrices, *sides, *kept, totals, precision


register(Op("similarity_statistics", _fake_statistics, _sample_statistics, triton="contrastive"))
register(Op("similarity_gradient", fake_gradient, _sample_gradient, triton="contrastive"))


# Parts of the compiled kernels, as operators for the tests that hold them to their errors.


def _fake_products(x, t, g, precision):
    dtype = accumulation_dtype(x.dtype)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in (g.shape, x.shape, t.shape))


def _sample_products(source: Source) -> Iterator[tuple]:
    yield source.normal(70, 5), source.normal(9, 5), source.normal(70, 9), "highest"


WIDE = (torch.float64, torch.float32)
register(Op("vector_exp", contiguous_like, lambda source: [(source.normal(40),)], dtypes=WIDE))
register(Op("tile_products", _fake_products, _sample_products))
register(
    Op(
        "product_arithmetic",
        lambda x, precision: x.new_empty(1, dtype=torch.int64),
        lambda source: [(source.normal(1), "high")],
    )
)
