"""The contrastive losses on a GPU: two launches a panel of rows forward, one backward.

    forward     statistics_kernel, combine_kernel; `keep` leaves (heads, n, pitch) exponentials behind
    backward    gradient_kernel; without kept exponentials keep_kernel before it, a panel of rows at a time

Of large matrices (`configs.by_library`) the library makes the products, piece by piece:

    forward     S, strips_kernel, ..., combine_kernel
    backward    factors_kernel, weights_kernel, G t, G^T x, ..., finish_kernel; without kept exponentials S before
                weights_kernel

Nothing here waits for the device, so the losses can be captured in a CUDA graph. Memory beyond results and what is
kept: statistics of tiles and, in the backward without kept exponentials, a panel of them (configs.py), both
proportional to the larger of n and m once that is large. With the library's products also a piece of S in float32 for
each matrix, a piece of G, and both gradients in float32.

`row` is (11, n): the eight `Statistics` of robustft/ops/similarity.py, S_ii, the teacher's S_ii, and how often sample
i's label occurs. `col` is (8, m).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustft.ops import layouts
from robustft.ops.similarity import Statistics
from robustft.ops.triton import autotune, configs, products
from robustft.ops.triton.combine import combine_kernel
from robustft.ops.triton.gradient import gradient_kernel, keep_kernel
from robustft.ops.triton.launch import addressable, architecture, launch
from robustft.ops.triton.statistics import statistics_kernel
from robustft.ops.triton.strips import strips_kernel
from robustft.ops.triton.table import dot_precision
from robustft.ops.triton.tile import LABELS, PAIRS, RECTANGLE
from robustft.ops.triton.weights import factors_kernel, finish_kernel, weights_kernel

PAIR_ROW = len(Statistics._fields)
COUNTS_ROW = PAIR_ROW + 2
"""Rows of `row` below the statistics."""


Results = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor]
"""row, col, tiles, kept, losses, by_scale."""


class Matrices(NamedTuple):
    """What the matrices of similarities are made of, and where their targets are."""

    x: Tensor
    t: Tensor
    scale: Tensor
    x_teacher: Tensor | None
    t_teacher: Tensor | None
    teacher_scale: Tensor | None
    x_labels: Tensor | None
    t_labels: Tensor | None
    targets: int
    precision: str

    @property
    def heads(self) -> int:
        return 1 if self.x_teacher is None else 2

    @property
    def arithmetic(self) -> str:
        return configs.arithmetic(self.x.dtype, self.precision)

    @property
    def gradient_arithmetic(self) -> str:
        return configs.gradient_arithmetic(self.x.dtype, self.precision)

    def load(self, totals: bool) -> int:
        """What a tile has to hold at a time (configs.py)."""
        return self.heads + (totals or self.targets != PAIRS.value)

    def row(self, arithmetic: str, load: int) -> tuple:
        """Of the tables in configs.py."""
        small = max(self.x.shape[0], self.t.shape[0]) <= configs.SMALL
        return architecture(self.x.device), arithmetic, load, small

    @property
    def by_library(self) -> bool:
        """Whether the products are the library's."""
        factors = [f for f in (self.x, self.t, self.x_teacher, self.t_teacher) if f is not None]
        return configs.by_library(self.x.shape[0], self.t.shape[0], factors, architecture(self.x.device))

    def tile(self, load: int) -> configs.Tile:
        if self.by_library:  # the tile of its records; no more than its sides is asked for
            strip = configs.strip(load)
            return configs.Tile(strip.bm, strip.width, 16, strip.warps, 1)
        return configs.tile(self.x.shape[1], *self.row(self.arithmetic, load))

    def block(self, load: int, tile: configs.Tile) -> configs.Block:
        return configs.block(self.x.shape[1], tile, *self.row(self.gradient_arithmetic, load))


def _matrices(x, t, scale, x_labels, t_labels, xt, tt, st, targets, precision=None) -> Matrices:
    def flat(labels: Tensor | None) -> Tensor | None:
        return labels if labels is None else labels.contiguous()

    precision = precision or torch.get_float32_matmul_precision()
    x, t, xt, tt = (None if f is None else addressable(f) for f in (x, t, xt, tt))
    return Matrices(x, t, scale, xt, tt, st, flat(x_labels), flat(t_labels), targets, precision)


def _pairs(x, t, scale, labels, xt=None, tt=None, st=None) -> Matrices:
    return _matrices(x, t, scale, labels, labels, xt, tt, st, (PAIRS if labels is None else LABELS).value)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _tiles(of: Matrices, tile: configs.Tile) -> Callable[[dict[str, Any]], None]:
    """Launches statistics_kernel on a panel, with what it needs beside the panel's arguments."""
    d = of.x.shape[1]
    more = {
        "X": of.x, "T": of.t, "X_TEACHER": of.x_teacher, "T_TEACHER": of.t_teacher,
        "d": d, "d_teacher": d if of.x_teacher is None else of.x_teacher.shape[1],
        "x_stride": of.x.stride(0), "t_stride": of.t.stride(0),
        "x_teacher_stride": _stride(of.x_teacher), "t_teacher_stride": _stride(of.t_teacher),
        **tile.constants(of.arithmetic),
    }  # fmt: skip

    def run(panel: dict[str, Any]) -> None:
        programs = _cdiv(panel["rows"], tile.bm) * _cdiv(panel["m"], tile.bn)
        launch(statistics_kernel, programs, {**more, **panel}, warps=tile.warps, stages=tile.stages)

    return run


def _similarities(of: Matrices, part: products.Piece, given: Sequence[Tensor | None]) -> None:
    """The library's products of a piece of S, and of the teacher's, written to the beginning of `given`."""
    for S, x, t in zip(given, (of.x, of.x_teacher), (of.t, of.t_teacher), strict=False):
        assert S is not None and x is not None and t is not None
        x, t = x[part.row0 :][: part.rows], t[part.col0 :][: part.cols]
        products.multiply(x, t.T, S[: part.rows, : part.cols], of.precision)


def _strips(of: Matrices, strip: configs.Strip, panel_rows: int) -> Callable[[dict[str, Any]], None]:
    """Likewise the library's products and strips_kernel, piece by piece of a panel."""
    m = of.t.shape[0]
    sides = [min(a, b) for a, b in zip(configs.FORWARD_PIECE, (panel_rows, m), strict=True)]
    # Of whole strips, which the kernel reads, and of one width for all sizes, which it is compiled for.
    rows, width = _cdiv(sides[0], strip.bm) * strip.bm, layouts.pitch(configs.FORWARD_PIECE.cols)
    given = [of.x.new_empty(rows, width, dtype=torch.float32) for _ in range(of.heads)]
    pairs = of.targets != RECTANGLE.value
    bounds = products.bounds(of.x, of.t, pairs)
    more = {
        "S": given[0], "S_TEACHER": given[-1], "STRIDE": given[0].stride(0),
        **dict(zip(("X_NORM", "T_NORM", "PAIR_LEAST"), bounds, strict=True)),
        "X_TEACHER_NORM": None, "T_TEACHER_NORM": None, "TEACHER_LEAST": None,
        "BM": strip.bm, "BN": strip.bn, "CHUNKS": strip.chunks, "WARPS": strip.warps,
    }  # fmt: skip
    if of.x_teacher is not None and of.t_teacher is not None:
        bounds = products.bounds(of.x_teacher, of.t_teacher, pairs)
        more |= zip(("X_TEACHER_NORM", "T_TEACHER_NORM", "TEACHER_LEAST"), bounds, strict=True)

    def run(panel: dict[str, Any]) -> None:
        for part in products.pieces(panel["rows"], m, *sides):
            _similarities(of, part._replace(row0=panel["row0"] + part.row0), given)
            piece = {
                "row_tile": part.row0 // strip.bm, "col_tile": part.col0 // strip.width,
                "piece_rows": part.rows, "piece_cols": part.cols,
            }  # fmt: skip
            programs = _cdiv(part.rows, strip.bm) * _cdiv(part.cols, strip.width)
            launch(strips_kernel, programs, {**more, **panel, **piece}, warps=strip.warps)

    return run


def _forward(of: Matrices, totals: bool, smoothing: float, keep: bool) -> Results:
    """row, col, tiles, kept, and unless the targets are a rectangle's the losses and their derivatives by scale."""
    n, m, heads = of.x.shape[0], of.t.shape[0], of.heads
    tile, combine = of.tile(of.load(totals)), configs.combine("contrastive")
    new = of.x.new_empty
    tiles, kept = layouts.similarities("triton", n, m, heads, keep, of.x.dtype).like(of.x)
    f32 = torch.float32
    row, col = (new(rows, size, dtype=f32) for rows, size in zip(layouts.TRITON_SIDES, (n, m), strict=True))
    losses, by_scale = [new(n, dtype=f32) for _ in range(heads)], new(heads, n, dtype=f32)
    kinds = 3 * heads + (of.targets != PAIRS.value) + totals
    if of.by_library:
        panel = min(configs.strip_rows(m, kinds, tile.bm), n)
        statistics = _strips(of, configs.strip(of.load(totals)), panel)
    else:
        panel = min(configs.panel_rows(m, kept.element_size()), n)
        statistics = _tiles(of, tile)
    down, across = _cdiv(panel, tile.bm), _cdiv(m, tile.bn)
    row_part, col_part = new(kinds * across * panel, dtype=f32), new(kinds * down * m, dtype=f32)
    # Records of tiles are the whole matrix's if they are kept, else this panel's.
    tiles_stride = 2 * across * (_cdiv(n, tile.bm) if keep else down)
    records = tiles if keep else new(heads * tiles_stride, dtype=f32)
    switches = {"TARGETS": of.targets, "TEACHER": heads == 2, "TOTALS": totals}
    for row0 in range(0, n, panel):
        rows = min(panel, n - row0)
        down = _cdiv(rows, tile.bm)
        tiles_here = records[2 * across * (row0 // tile.bm) :] if keep else records
        statistics(
            {
                "SCALE": of.scale, "TEACHER_SCALE": of.teacher_scale,
                "X_LABELS": of.x_labels, "T_LABELS": of.t_labels,
                "ROW": row_part, "COL": col_part, "PAIR": row[PAIR_ROW:], "KEPT": kept,
                "TILES": tiles_here, "tiles_stride": tiles_stride,
                "row0": row0, "rows": rows, "n": n, "m": m, "pitch": kept.shape[1], **switches, "KEEP": keep,
            }
        )  # fmt: skip
        launch(
            combine_kernel,
            _cdiv(max(n, m), combine.bs),
            {
                "ROW_PART": row_part, "COL_PART": col_part, "TILES": tiles_here, "tiles_stride": tiles_stride,
                "ROW": row, "COL": col,
                "SCALE": of.scale, "TEACHER_SCALE": of.teacher_scale, "LABELS_AT": of.x_labels,
                "LOSS": losses[0], "DISTILLATION": losses[-1], "BY_SCALE": by_scale, "COUNTS": row[COUNTS_ROW],
                "row0": row0, "rows": rows, "row_tiles": down, "col_tiles": across, "n": n, "m": m,
                "smoothing": float(smoothing),
                **switches, "BM": tile.bm, "BN": tile.bn, "BS": combine.bs, "BT": combine.bt, "BC": combine.bc,
            },
            warps=combine.warps,
        )  # fmt: skip
    return row, col, tiles, kept, losses, by_scale


def _backward(
    of: Matrices, row, col, tiles, kept, totals: bool, smoothing: float, g=None, h=None, by_scale=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, dt and, where there are losses, ds. row and col are coefficients if the targets are a rectangle's."""
    if of.by_library:
        return _backward_by_library(of, row, col, tiles, kept, totals, smoothing, g, h, by_scale)
    (n, d), m, heads = of.x.shape, of.t.shape[0], of.heads
    keep = len(kept) > 0
    # Kept by statistics_kernel, or now by keep_kernel, one matrix at a time.
    tile = of.tile(of.load(totals) if keep else 1)
    block = of.block(of.load(totals), tile)
    dx, dt = (torch.empty_like(f, memory_format=torch.contiguous_format) for f in (of.x, of.t))
    ds = None if by_scale is None else torch.empty_like(of.scale)
    dtype = layouts.TRITON_KEPT[of.x.dtype]
    panel = n if keep else min(configs.panel_rows(m, dtype.itemsize), n)
    # More than one panel add to dt, in float32.
    sums = dt if panel == n else torch.empty_like(dt, dtype=torch.float32)
    across, parts = _cdiv(m, tile.bn), _cdiv(d, block.bd)
    if not keep:
        tiles = of.x.new_empty(heads * _cdiv(panel, tile.bm) * across * 2, dtype=torch.float32)
        kept = of.x.new_empty(heads * panel, layouts.pitch(m), dtype=dtype)
    matrices = [(of.x, of.t, of.scale)]
    if of.x_teacher is not None and of.t_teacher is not None and of.teacher_scale is not None:
        matrices.append((of.x_teacher, of.t_teacher, of.teacher_scale))
    pitch = kept.shape[1]
    for row0 in range(0, n, panel):
        rows = min(panel, n - row0)
        down = _cdiv(rows, tile.bm)
        for head, (x, t, scale) in enumerate(() if keep else matrices):
            launch(
                keep_kernel,
                down * across,
                {
                    "X": x, "T": t, "SCALE": scale,
                    "KEPT": kept[head * rows :], "TILES": tiles[head * down * across * 2 :],
                    "row0": row0, "rows": rows, "n": n, "m": m, "d": x.shape[1],
                    "x_stride": x.stride(0), "t_stride": t.stride(0), "pitch": pitch,
                    **tile.constants(of.arithmetic),
                },
                warps=tile.warps,
                stages=tile.stages,
            )  # fmt: skip
        blocks = _cdiv(rows, block.bm) + _cdiv(m, block.bm)
        launch(
            gradient_kernel,
            blocks * parts + (ds is not None and row0 == 0),
            {
                "X": of.x, "T": of.t, "SCALE": of.scale, "TEACHER_SCALE": of.teacher_scale,
                "X_LABELS": of.x_labels, "T_LABELS": of.t_labels, "KEPT": kept, "TILES": tiles,
                "ROW": row, "COL": col, "PAIR": row[PAIR_ROW:], "COUNTS": row[COUNTS_ROW:],
                "G": g, "H": h, "BY_SCALE": by_scale,
                "DX": dx, "DT": sums, "DS": ds,
                "row0": row0, "rows": rows, "n": n, "m": m, "d": d,
                "x_stride": of.x.stride(0), "t_stride": of.t.stride(0), "pitch": pitch,
                "g_stride": _stride(g), "h_stride": _stride(h), "smoothing": float(smoothing),
                "TARGETS": of.targets, "TEACHER": heads == 2, "SMOOTHED": totals,
                "PRECISION": dot_precision(of.gradient_arithmetic), "TILE_M": tile.bm, "TILE_N": tile.bn,
                "BM": block.bm, "BD": block.bd, "BK": block.bk,
            },
            warps=block.warps,
            stages=block.stages,
        )  # fmt: skip
    return dx, sums.to(dt.dtype), ds


def _in_range(of: Matrices, row, col, g, h) -> tuple[Tensor, dict[str, Any]]:
    """The unit by which G is within float16's range (products.py), and weights_kernel's arguments times it.

    A side's part of G is a p - b same - u - c pt with p, pt of a row between 0 and 1. Of a loss, a is what b, u and c
    are together: so the part is no more than a, which is g / 2 + h.
    """
    if of.targets == RECTANGLE.value:
        linear = [2, 3, 4] if of.heads == 1 else [2, 3, 4, 7]  # of `Coefficients`
        unit = products.unit(products.largest(*(side[kind] for side in (row, col) for kind in linear)))
        factors = torch.ones(len(row), 1, dtype=row.dtype, device=row.device)
        for kind in linear:
            factors[kind] = unit
        return unit, {"ROW": row * factors, "COL": col * factors}
    unit = products.unit(products.largest(g) if h is None else products.largest(g, h, h))
    g, h = (None if each is None else each * unit for each in (g, h))
    return unit, {"G": g, "H": h, "g_stride": _stride(g), "h_stride": _stride(h)}


def _backward_by_library(
    of: Matrices, row, col, tiles, kept, totals: bool, smoothing: float, g, h, by_scale
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_backward` of a large matrix."""
    (n, d), m, heads = of.x.shape, of.t.shape[0], of.heads
    keep, tile, weigh = len(kept) > 0, of.tile(of.load(totals)), configs.weights(of.load(totals))
    piece = configs.kept_piece(of.x.element_size()) if keep else configs.BACKWARD_PIECE
    rows, cols = (min(a, b) for a, b in zip(piece, (n, m), strict=True))
    new, f32 = of.x.new_empty, torch.float32
    x_sums, t_sums = new(n, d, dtype=f32), new(m, d, dtype=f32)
    weights = new(rows, layouts.pitch(cols), dtype=of.x.dtype)
    given = [None if keep else new(rows, layouts.pitch(cols), dtype=f32) for _ in range(heads)]
    switches = {"TARGETS": of.targets, "TEACHER": heads == 2, "SMOOTHED": totals}
    of_samples = {
        "SCALE": of.scale, "TEACHER_SCALE": of.teacher_scale,
        "ROW": row, "COL": col, "COUNTS": row[COUNTS_ROW:], "G": g, "H": h,
        "n": n, "m": m, "g_stride": _stride(g), "h_stride": _stride(h), "smoothing": float(smoothing), **switches,
    }  # fmt: skip
    in_range: dict[str, Any] = {}
    if of.x.dtype == torch.float16:
        unit, in_range = _in_range(of, row, col, g, h)
    factors = [new(4, size, dtype=f32) for size in (n, m)]
    samples = configs.FACTORS
    launch(
        factors_kernel,
        _cdiv(n, samples) + _cdiv(m, samples),
        {
            "TILES": tiles, "tiles_stride": 2 * _cdiv(n, tile.bm) * _cdiv(m, tile.bn),
            "ROW_FACTORS": factors[0], "COL_FACTORS": factors[1], **of_samples, **in_range,
            "GIVEN": not keep, "BS": samples,
        },
        warps=4,
    )  # fmt: skip
    for part in products.pieces(n, m, rows, cols):
        if not keep:
            _similarities(of, part, given)
        launch(
            weights_kernel,
            _cdiv(part.rows, weigh.bm * weigh.chunks) * _cdiv(part.cols, weigh.bn),
            {
                "KEPT": kept, "TILES": tiles,
                "S_GIVEN": given[0], "S_TEACHER": given[-1], "given_stride": _stride(given[0]),
                "WEIGHTS": weights, "weights_stride": weights.stride(0),
                "ROW_FACTORS": factors[0], "COL_FACTORS": factors[1],
                "X_LABELS": of.x_labels, "T_LABELS": of.t_labels,
                "row0": part.row0, "rows": part.rows, "col0": part.col0, "cols": part.cols, "pitch": kept.shape[1],
                **of_samples, **in_range, "GIVEN": not keep,
                "TILE_M": tile.bm, "TILE_N": tile.bn, "BM": weigh.bm, "BN": weigh.bn, "CHUNKS": weigh.chunks,
            },
            warps=weigh.warps,
        )  # fmt: skip
        G = weights[: part.rows, : part.cols]
        i, j = slice(part.row0, part.row0 + part.rows), slice(part.col0, part.col0 + part.cols)
        products.multiply(G, of.t[j], x_sums[i], of.precision, add=part.col0 > 0)
        products.multiply(G.T, of.x[i], t_sums[j], of.precision, add=part.row0 > 0)
    if in_range:
        for sums in (x_sums, t_sums):
            sums.div_(unit)
    dx, dt = (torch.empty_like(f, memory_format=torch.contiguous_format) for f in (of.x, of.t))
    ds = None if by_scale is None else torch.empty_like(of.scale)
    finish = configs.FINISH
    launch(
        finish_kernel,
        (_cdiv(n, finish.bm) + _cdiv(m, finish.bm)) * _cdiv(d, finish.bd) + (ds is not None),
        {
            "X": of.x, "T": of.t, "X_SUMS": x_sums, "T_SUMS": t_sums, "PAIR": row[PAIR_ROW:], "BY_SCALE": by_scale,
            "DX": dx, "DT": dt, "DS": ds, "d": d, "x_stride": of.x.stride(0), "t_stride": of.t.stride(0),
            **of_samples, "BM": finish.bm, "BD": finish.bd,
        },
        warps=finish.warps,
    )  # fmt: skip
    return dx, dt, ds


def similarity_statistics(x, t, scale, x_labels, t_labels, xt, tt, st, totals, keep, precision):
    of = _matrices(x, t, scale, x_labels, t_labels, xt, tt, st, RECTANGLE.value, precision)
    row, col, tiles, kept, *_ = _forward(of, totals, 0.0, keep)
    kinds = 5 if xt is None else len(Statistics._fields)
    return row[:kinds], col[:kinds], tiles, kept


def similarity_gradient(x, t, scale, x_labels, t_labels, xt, tt, st, row, col, tiles, kept, totals, precision):
    of = _matrices(x, t, scale, x_labels, t_labels, xt, tt, st, RECTANGLE.value, precision)
    dx, dt, _ = _backward(of, row.contiguous(), col.contiguous(), tiles, kept, totals, 0.0)
    return dx, dt


def _tune(of: Matrices, totals: bool, smoothing: float, keep: bool) -> None:
    """Where ROBUSTFT_AUTOTUNE asks for it: the rows of a loss as it is called, forward and backward."""
    load = of.load(totals)

    def forward() -> object:
        return _forward(of, totals, smoothing, keep)

    choice = configs.tiles(*of.row(of.arithmetic, load))
    autotune.tune(choice, autotune.tiles(choice), forward)
    autotune.tune(configs.combines("contrastive"), autotune.combines(), forward)
    row, col, tiles, kept, losses, by_scale = _forward(of, totals, smoothing, keep)
    g = [torch.ones_like(loss) for loss in losses]
    h = g[-1] if of.heads == 2 else None

    def backward() -> object:
        return _backward(of, row, col, tiles, kept, totals, smoothing, g[0], h, by_scale)

    if not keep:
        choice = configs.tiles(*of.row(of.arithmetic, 1))
        autotune.tune(choice, autotune.tiles(choice), backward)
    blocks = autotune.blocks(of.tile(load if keep else 1))
    autotune.tune(configs.blocks(*of.row(of.gradient_arithmetic, load)), blocks, backward)


def _losses(of: Matrices, label_smoothing: float, keep: bool) -> Results:
    totals = label_smoothing > 0
    if autotune.WANTED and not of.by_library:
        _tune(of, totals, label_smoothing, keep)
    return _forward(of, totals, label_smoothing, keep)


def contrastive_loss(x, t, scale, labels, label_smoothing, keep):
    row, col, tiles, kept, losses, by_scale = _losses(_pairs(x, t, scale, labels), label_smoothing, keep)
    return losses[0], by_scale[0], row, col, tiles, kept


def contrastive_loss_backward(grad, x, t, scale, labels, label_smoothing, by_scale, row, col, tiles, kept):
    of = _pairs(x, t, scale, labels)
    return _backward(of, row, col, tiles, kept, label_smoothing > 0, label_smoothing, grad, None, by_scale)


def contrastive_distillation_loss(x, t, scale, xt, tt, st, labels, keep):
    row, col, tiles, kept, losses, by_scale = _losses(_pairs(x, t, scale, labels, xt, tt, st), 0.0, keep)
    return losses[0], losses[1], by_scale, row, col, tiles, kept


def contrastive_distillation_loss_backward(g, h, x, t, scale, xt, tt, st, labels, by_scale, row, col, tiles, kept):
    of = _pairs(x, t, scale, labels, xt, tt, st)
    return _backward(of, row, col, tiles, kept, False, 0.0, g, h, by_scale)
