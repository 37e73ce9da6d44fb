"""The sigmoid losses on a GPU, piece by piece of the matrix, with products by the device's library (products.py).

    S of a piece in float32 -> sigmoid_kernel: sums of its rows, and G -> dx += G t, dt += G^T x

with, per entry, z = s S + b, e = exp(-|z|) and log(1 + e) by its own series, since 1 + e would round a small e away:

    softplus(z) = max(z, 0) + log(1 + e)        sigmoid(z) = 1 / (1 + e), or e / (1 + e) where z < 0

One kernel for losses and gradients: a row waits for nothing but its own entries. The library's rate at the products is
what no kernel here reaches, and between them an entry is written and read once as S and once as G. G is rounded to
the features' dtype; of float16 it is multiplied by a power of two before (products.py), by its bound s max |weight|,
the teacher's weights added. Nothing here waits for the device. Memory beyond the results: a piece of S and of the
teacher's, unless they are kept whole, and one of G, 0.7 GB at most for 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft.ops import layouts
from robustft.ops.triton import configs, products
from robustft.ops.triton.launch import launch
from robustft.ops.triton.tile import long


@triton.jit
def _log1p(e):
    """log(1 + e) of e in [0, 1], as csrc/cpu/similarity/sigmoid_kernels.cpp has it."""
    u = e / (e + 2.0)
    v = u * u
    p = v * (2.0 / 17.0) + 2.0 / 15.0
    p = p * v + 2.0 / 13.0
    p = p * v + 2.0 / 11.0
    p = p * v + 2.0 / 9.0
    p = p * v + 2.0 / 7.0
    p = p * v + 2.0 / 5.0
    p = p * v + 2.0 / 3.0
    p = p * v + 2.0
    return p * u


@triton.jit
def _sigmoid(z):
    """exp(-|z|), the sigmoid of z, and that of -z."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return e, tl.where(z > 0.0, large, small), tl.where(z > 0.0, small, large)


@triton.jit
def _add(SUMS, at, sums, first, inside):
    """To what earlier pieces of these rows have, if there were any."""
    before = tl.load(SUMS + at, mask=inside & (first == 0), other=0.0)
    tl.store(SUMS + at, before + tl.sum(sums, 1), mask=inside)


@triton.jit(do_not_specialize=["row0", "col0"])
def sigmoid_kernel(
    S, S_TEACHER, s_stride,  # (rows, cols) float32, of this piece
    G, g_stride,  # (rows, cols), if there are weights
    SUMS, WEIGHT,  # (3, n) and (1, n), with a teacher (6, n) and (2, n)
    X_LABELS, T_LABELS, SCALE, BIAS, TEACHER_SCALE, TEACHER_BIAS,  # (n,), (m,), one element each
    row0, rows, col0, cols, n,
    TEACHER: tl.constexpr, GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    in_row, i = r < rows, row0 + r
    scale, bias = tl.load(SCALE).to(tl.float32), tl.load(BIAS).to(tl.float32)
    own_label = tl.load(X_LABELS + i, mask=in_row, other=0)
    if GRADIENT:
        weight = scale * tl.load(WEIGHT + i, mask=in_row, other=0.0)
    loss, by_scale, by_bias = (
        tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    )  # fmt: skip
    if TEACHER:
        teacher_scale, teacher_bias = tl.load(TEACHER_SCALE).to(tl.float32), tl.load(TEACHER_BIAS).to(tl.float32)
        teacher_loss, teacher_by_scale, teacher_by_bias = loss, by_scale, by_bias
        if GRADIENT:
            teacher_weight = scale * tl.load(WEIGHT + long(n) + i, mask=in_row, other=0.0)
    s_at = r.to(tl.int64)[:, None] * s_stride
    g_at = r.to(tl.int64)[:, None] * g_stride
    for start in range(0, cols, BN):
        c = start + tl.arange(0, BN)
        in_col = c < cols
        valid = in_row[:, None] & in_col[None, :]
        s = tl.load(S + s_at + c[None, :], mask=valid, other=0.0)
        other_label = tl.load(T_LABELS + col0 + c, mask=in_col, other=0)
        same = own_label[:, None] == other_label[None, :]
        z = s * scale + bias
        e, of_z, of_minus_z = _sigmoid(z)
        rest = _log1p(e)
        up = tl.where(z > 0.0, z, 0.0)
        loss += tl.where(valid, rest + tl.where(same, up - z, up), 0.0)
        g = tl.where(valid, tl.where(same, -of_minus_z, of_z), 0.0)
        by_scale += g * s
        by_bias += g
        if GRADIENT:
            gradient = g * weight[:, None]
        if TEACHER:
            zt = tl.load(S_TEACHER + s_at + c[None, :], mask=valid, other=0.0) * teacher_scale + teacher_bias
            _, teacher_of_z, teacher_of_minus_z = _sigmoid(zt)
            missed = tl.where(z > 0.0, teacher_of_minus_z * z, -teacher_of_z * z)
            teacher_loss += tl.where(valid, rest + missed, 0.0)
            # Of two probabilities near 1 the difference is that of what they lack of it.
            both_high = (z > 0.0) & (zt > 0.0)
            h = tl.where(both_high, teacher_of_minus_z - of_minus_z, of_z - teacher_of_z)
            h = tl.where(valid, h, 0.0)
            teacher_by_scale += h * s
            teacher_by_bias += h
            if GRADIENT:
                gradient += h * teacher_weight[:, None]
        if GRADIENT:
            tl.store(G + g_at + c[None, :], gradient.to(G.dtype.element_ty), mask=valid)
    plane = long(n)
    _add(SUMS, i, loss, col0 == 0, in_row)
    _add(SUMS, plane + i, by_scale, col0 == 0, in_row)
    _add(SUMS, 2 * plane + i, by_bias, col0 == 0, in_row)
    if TEACHER:
        _add(SUMS, 3 * plane + i, teacher_loss, col0 == 0, in_row)
        _add(SUMS, 4 * plane + i, teacher_by_scale, col0 == 0, in_row)
        _add(SUMS, 5 * plane + i, teacher_by_bias, col0 == 0, in_row)


def sigmoid_sweep(x, t, scale, bias, x_labels, t_labels, xt, tt, st, bt, weight, similarities, keep, precision):
    (n, d), m, teacher, gradient = x.shape, t.shape[0], xt is not None, weight is not None
    new, f32 = x.new_empty, torch.float32
    sums = new(6 if teacher else 3, n, dtype=f32)
    dx, dt = new(n if gradient else 0, d, dtype=f32), new(m if gradient else 0, d, dtype=f32)
    rows, cols = (min(a, b) for a, b in zip(configs.BACKWARD_PIECE, (n, m), strict=True))
    factors = [(x, t), (xt, tt)] if teacher else [(x, t)]
    unit = None
    if weight is not None and x.dtype == torch.float16:
        # A scale of 0 must not leave room for a unit that takes the weights themselves out of float32's range.
        unit = products.unit(products.largest(*weight) * scale.abs().clamp(min=2.0**-60))
        weight = weight * unit
    pitch = layouts.pitch(cols)
    weighted = new(rows, pitch, dtype=x.dtype) if gradient else None
    kept = new(len(factors) * n if keep else 0, m, dtype=f32)
    whole = similarities if similarities is not None else kept if keep else None
    pieces = [] if whole is not None else [new(rows, pitch, dtype=f32) for _ in factors]
    tile = configs.SIGMOID
    for part in products.pieces(n, m, rows, cols):
        mine, others = slice(part.row0, part.row0 + part.rows), slice(part.col0, part.col0 + part.cols)
        if whole is not None:
            here = [of[mine, others] for of in whole.split(n)]
        else:
            here = [S[: part.rows, : part.cols] for S in pieces]
        if similarities is None:
            for S, (a, b) in zip(here, factors, strict=True):
                products.multiply(a[mine], b[others].T, S, precision)
        launch(
            sigmoid_kernel,
            -(-part.rows // tile.bm),
            {
                "S": here[0], "S_TEACHER": here[-1], "s_stride": here[0].stride(0),
                "G": weighted, "g_stride": 0 if weighted is None else weighted.stride(0),
                "SUMS": sums, "WEIGHT": None if weight is None else weight.contiguous(),
                "X_LABELS": x_labels.contiguous(), "T_LABELS": t_labels.contiguous(),
                "SCALE": scale, "BIAS": bias, "TEACHER_SCALE": st, "TEACHER_BIAS": bt,
                "row0": part.row0, "rows": part.rows, "col0": part.col0, "cols": part.cols, "n": n,
                "TEACHER": teacher, "GRADIENT": gradient, "BM": tile.bm, "BN": tile.bn,
            },
            warps=tile.warps,
        )  # fmt: skip
        if weighted is not None:
            g: Tensor = weighted[: part.rows, : part.cols]
            products.multiply(g, t[others], dx[mine], precision, add=part.col0 > 0)
            products.multiply(g.T, x[mine], dt[others], precision, add=part.row0 > 0)
    if unit is not None:
        for total in (dx, dt):
            total.div_(unit)
    return sums, dx, dt, kept
