"""The losses on class logits on a GPU: at most three launches a panel of rows forward, one backward.

    forward     label_kernel (not with top1, nor of two heads), class_statistics_kernel, *_combine_kernel; `keep` leaves
                (n, heads pitch) exponentials and (heads tiles, n) maxima behind
    backward    class_gradient_kernel; without kept exponentials class_statistics_kernel before it, a panel at a time;
                for many rows the stretches' sums of dw are added up after it

Nothing here waits for the device, so the losses can be captured in a CUDA graph. Memory beyond results and what is
kept: statistics of the tiles of a panel of rows, and, in the backward, a panel of exponentials if none were kept and
stretches of dw, a few MB more than dw itself in float32 (configs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops import layouts
from robustft.ops.arguments import VARIANTS
from robustft.ops.triton import autotune, configs
from robustft.ops.triton.class_gradient import class_gradient_kernel
from robustft.ops.triton.class_losses import classification_combine_kernel, dual_combine_kernel
from robustft.ops.triton.class_statistics import (
    ALL,
    KEPT_ROWS,
    NONE,
    SOFT,
    TOP,
    UNIFORM,
    class_statistics_kernel,
    label_kernel,
)
from robustft.ops.triton.launch import addressable, architecture, launch
from robustft.ops.triton.table import dot_precision


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Classes(NamedTuple):
    """What the logits are made of, and what is asked of them."""

    x: Tensor
    w: Tensor
    scale: Tensor
    bias: Tensor | None
    labels: Tensor
    q: Tensor | None
    heads: int
    above: int
    targets: int

    @property
    def k(self) -> int:
        return len(self.w) // self.heads

    def row(self, arithmetic: str) -> tuple:
        """Of the tables in configs.py."""
        small = len(self.x) * len(self.w) <= configs.SMALL_CLASSES
        return architecture(self.x.device), arithmetic, "classes" if self.heads == 1 else "heads", small

    @property
    def arithmetic(self) -> str:
        return configs.arithmetic(self.x.dtype, torch.get_float32_matmul_precision())

    @property
    def gradient_arithmetic(self) -> str:
        return configs.gradient_arithmetic(self.x.dtype, torch.get_float32_matmul_precision())

    def tile(self) -> configs.Tile:
        return configs.tile(self.x.shape[1], *self.row(self.arithmetic))

    def block(self, tile: configs.Tile) -> configs.Block:
        return configs.block(self.x.shape[1], tile, *self.row(self.gradient_arithmetic))

    def tiles(self, tile: configs.Tile) -> int:
        """Of one head's classes."""
        return _cdiv(self.k, tile.bn)

    def panel_rows(self, size: int) -> int:
        return min(configs.panel_rows(len(self.w), size), len(self.x))


def _classes(x, w, scale, bias, labels, q, heads, above, targets) -> Classes:
    bias, q = None if bias is None else bias.contiguous(), None if q is None else addressable(q)
    x, w, labels = addressable(x), addressable(w), labels.contiguous()
    return Classes(x, w, scale, bias, labels, q, heads, above.value, targets.value)


def _statistics(of: Classes, tile: configs.Tile, row0: int, rows: int, keep: bool, **results) -> None:
    launch(
        class_statistics_kernel,
        _cdiv(rows, tile.bm) * of.heads * of.tiles(tile),
        {
            "X": of.x, "W": of.w, "SCALE": of.scale, "BIAS": of.bias, "LABELS": of.labels, "Q": of.q, **results,
            "row0": row0, "rows": rows, "n": len(of.x), "k": of.k, "d": of.x.shape[1],
            "x_stride": of.x.stride(0), "w_stride": of.w.stride(0), "q_stride": 0 if of.q is None else of.q.stride(0),
            "pitch": layouts.pitch(of.k), "HEADS": of.heads, "ABOVE": of.above, "TARGETS": of.targets,
            "KEEP": keep, **tile.constants(of.arithmetic),
        },
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


def _threshold(of: Classes, tile: configs.Tile) -> Tensor:
    """(n,): z_y."""
    n, k = len(of.x), of.k
    z = of.x.new_empty(n, dtype=torch.float32)
    sides = {name: value for name, value in tile.constants(of.arithmetic).items() if name != "GROUP"}
    launch(
        label_kernel,
        _cdiv(n, min(tile.bm, tile.bn)),
        {
            "X": of.x, "W": of.w, "SCALE": of.scale, "BIAS": of.bias, "LABELS": of.labels, "THRESHOLD": z,
            "n": n, "k": k, "d": of.x.shape[1], "x_stride": of.x.stride(0), "w_stride": of.w.stride(0), **sides,
        },
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
    return z


def _forward(of: Classes, keep: bool, combine_kernel, **combined) -> tuple[Tensor, Tensor]:
    """row and kept; the losses go into what the combining kernel is given."""
    n, tile, combine = len(of.x), of.tile(), configs.combine("classes")
    tiles = of.heads * of.tiles(tile)
    row, kept = layouts.classes("triton", n, of.k, of.heads, keep, of.x.dtype).like(of.x)
    panel = of.panel_rows(1)
    scratch = row.new_empty(2 + 2 * (of.above != NONE.value) + 3 * (of.targets != NONE.value), tiles, panel)
    label = row.new_empty(of.heads, 2, n)
    maxima = row[KEPT_ROWS.value :] if keep else row.new_empty(tiles, panel)
    threshold = _threshold(of, tile) if of.above == ALL.value else None
    for row0 in range(0, n, panel):
        rows = min(panel, n - row0)
        at = maxima.view(-1)[row0:] if keep else maxima
        here = {"MAXIMA": at, "maxima_stride": maxima.shape[1], "PART": scratch, "LABEL": label}
        _statistics(of, tile, row0, rows, keep, THRESHOLD=threshold, KEPT=kept[row0:] if keep else kept, **here)
        launch(
            combine_kernel,
            _cdiv(rows, combine.bs),
            {
                **here, "LABELS": of.labels, "ROW": row, **combined, "row0": row0, "rows": rows, "n": n, "k": of.k,
                "tiles": of.tiles(tile), "TARGETS": of.targets, "BS": combine.bs, "BT": combine.bt,
            },
            warps=combine.warps,
        )  # fmt: skip
    return row, kept


def _backward(
    of: Classes, g, h, by_gap, by_scale, row, kept, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw, db, of which nothing is written without a bias, and ds."""
    (n, d), cols = of.x.shape, len(of.w)
    keep = len(kept) > 0
    tile = of.tile()
    block = of.block(tile)
    tiles = of.heads * of.tiles(tile)
    dx, dw = (torch.empty_like(f, memory_format=torch.contiguous_format) for f in (of.x, of.w))
    db, ds = row.new_empty(cols), torch.empty_like(of.scale)
    dtype = layouts.TRITON_KEPT[of.x.dtype]
    panel = n if keep else of.panel_rows(dtype.itemsize)
    blocks = of.heads * _cdiv(of.k, block.bm) * _cdiv(d, block.bd)
    splits = configs.stretches(blocks, panel)
    # Of several stretches or panels the sums are float32.
    w_sums, b_sums = dw, db
    if splits > 1 or panel < n:
        w_sums, b_sums = row.new_empty(splits, cols, d), row.new_empty(splits, cols)
    maxima = row[KEPT_ROWS.value :]
    if not keep:
        maxima, kept = row.new_empty(tiles, panel), row.new_empty(panel, kept.shape[1], dtype=dtype)
    for row0 in range(0, n, panel):
        rows = min(panel, n - row0)
        if not keep:
            again = {"PART": None, "LABEL": None, "MAXIMA": maxima, "maxima_stride": panel, "KEPT": kept}
            _statistics(of, tile, row0, rows, True, THRESHOLD=row[2], **again)
        launch(
            class_gradient_kernel,
            blocks * splits + _cdiv(rows, block.bm) * _cdiv(d, block.bd) + (row0 == 0),
            {
                "X": of.x, "W": of.w, "SCALE": of.scale, "LABELS": of.labels, "Q": of.q,
                "ROW": row, "MAXIMA": maxima, "KEPT": kept, "G": g, "H": h, "BY_GAP": by_gap, "BY_SCALE": by_scale,
                "DX": dx, "DW": w_sums, "DB": None if of.bias is None else b_sums, "DS": ds,
                "row0": row0, "rows": rows, "n": n, "k": of.k, "d": d,
                "x_stride": of.x.stride(0), "w_stride": of.w.stride(0),
                "q_stride": 0 if of.q is None else of.q.stride(0), "maxima_stride": maxima.shape[1],
                "pitch": layouts.pitch(of.k), "g_stride": g.stride(0), "h_stride": h.stride(0),
                "smoothing": float(smoothing),
                "HEADS": of.heads, "ABOVE": of.above, "TARGETS": of.targets, "SPLITS": splits,
                "PRECISION": dot_precision(of.gradient_arithmetic), "TILE_N": tile.bn,
                "BM": block.bm, "BD": block.bd, "BK": block.bk,
            },
            warps=block.warps,
            stages=block.stages,
        )  # fmt: skip
    if w_sums is not dw:
        dw, db = w_sums.sum(0).to(dw.dtype), db if of.bias is None else b_sums.sum(0)
    return dx, dw, db, ds


def _tuned(of: Classes, forward: Callable, backward: Callable) -> tuple[Tensor, Tensor]:
    """What `forward` returns, after a search for better rows where ROBUSTFT_AUTOTUNE asks for it."""
    if autotune.WANTED:
        choice = configs.tiles(*of.row(of.arithmetic))
        autotune.tune(choice, autotune.tiles(choice), forward)
        autotune.tune(configs.combines("classes"), autotune.combines(), forward)
        row, kept = forward()
        blocks = configs.blocks(*of.row(of.gradient_arithmetic))
        autotune.tune(blocks, autotune.blocks(of.tile()), lambda: backward(row, kept))
    return forward()


def classification_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep):
    targets = UNIFORM if label_smoothing > 0 else NONE
    of = _classes(x, w, scale, bias, labels, None, 1, TOP if top1 else ALL, targets)
    cross_entropy, misalignment, by_gap = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))
    by_scale = x.new_empty(2, len(x), dtype=torch.float32)

    def forward() -> tuple[Tensor, Tensor]:
        return _forward(
            of, keep, classification_combine_kernel,
            CROSS_ENTROPY=cross_entropy, MISALIGNMENT=misalignment, BY_GAP=by_gap, BY_SCALE=by_scale,
            smoothing=float(label_smoothing), VARIANT=VARIANTS.index(variant), ABOVE=of.above,
        )  # fmt: skip

    g = cross_entropy
    row, kept = _tuned(of, forward, lambda row, kept: _backward(of, g, g, by_gap, by_scale, row, kept, label_smoothing))
    return cross_entropy, misalignment, by_gap, by_scale, row, kept


def classification_loss_backward(g, h, x, w, scale, bias, labels, top1, label_smoothing, by_gap, by_scale, row, kept):
    targets = UNIFORM if label_smoothing > 0 else NONE
    of = _classes(x, w, scale, bias, labels, None, 1, TOP if top1 else ALL, targets)
    return _backward(of, g, h, by_gap, by_scale, row, kept, label_smoothing)


def _dual(x, w, scale, labels, core) -> Classes:
    soft = core.dim() == 2
    return _classes(x, w, scale, None, labels, core if soft else None, 2, NONE, SOFT if soft else NONE)


def dual_risk(x, w, scale, labels, core, keep):
    of = _dual(x, w, scale, labels, core)
    empirical, worst_case = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    by_scale = x.new_empty(2, len(x), dtype=torch.float32)

    def forward() -> tuple[Tensor, Tensor]:
        return _forward(
            of, keep, dual_combine_kernel,
            CONFIDENCE=None if of.q is not None else core, confidence_stride=core.stride(0),
            EMPIRICAL=empirical, WORST_CASE=worst_case, BY_SCALE=by_scale,
        )  # fmt: skip

    g = empirical
    row, kept = _tuned(of, forward, lambda row, kept: _backward(of, g, g, None, by_scale, row, kept, 0.0))
    return empirical, worst_case, by_scale, row, kept


def dual_risk_backward(g, h, x, w, scale, labels, core, by_scale, row, kept):
    dx, dw, _, ds = _backward(_dual(x, w, scale, labels, core), g, h, None, by_scale, row, kept, 0.0)
    return dx, dw, ds
