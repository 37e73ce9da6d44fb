"""Softmax statistics of S = x t^T over the rows and columns of its tiles; combine.py adds them up.

    statistics_kernel   one program a tile: S in float32, its statistics by row and by column (one writer each), the
                        diagonal, and, if asked to, the tile's exponentials for the backward (tile.py)

Of each row and column of a tile: max, sum, weighted; with a teacher, of it likewise, with the student's S weighted;
then target and total. With e = exp(s (S - max)), sum = sum e and weighted = sum e (S - max); a narrow tile's e is
relative to the tile's offset, which keeps the maxima out of the registers that its sums need.
"""

import triton
import triton.language as tl

from robustft.ops.triton.tile import (
    LOWEST,
    PAIRS,
    RECTANGLE,
    exponential,
    keep_narrow,
    keep_wide,
    long,
    place,
    product,
    record,
)


@triton.jit
def _softmax(
    of, row_high, col_high, offset, step, scale,  # the matrix of the softmax, its maxima and record
    S, row_max, col_max, reference,  # the matrix that it weighs, its maxima, a number among its entries
    row_at, col_at, row_plane, col_plane, in_row, in_col, KEPT, at, KEEP: tl.constexpr,
):  # fmt: skip
    """Writes sum and weighted of the tile's rows and columns: of a narrow tile with e relative to the tile's offset and
    S to the reference, of a wide one to their maxima. Keeps the tile."""
    if step == 0.0:
        e = exponential(of, offset, scale)
        if KEEP:
            keep_narrow(KEPT, at, in_row[:, None] & in_col[None, :], e)
        tl.store(row_at, tl.sum(e, 1), mask=in_row)
        tl.store(col_at, tl.sum(e, 0), mask=in_col)
        e *= S - reference
        tl.store(row_at + row_plane, tl.sum(e, 1), mask=in_row)
        tl.store(col_at + col_plane, tl.sum(e, 0), mask=in_col)
    else:
        if KEEP:
            keep_wide(KEPT, at, in_row[:, None] & in_col[None, :], of, offset, step)
        e = exponential(of, row_high[:, None], scale)
        tl.store(row_at, tl.sum(e, 1), mask=in_row)
        tl.store(row_at + row_plane, tl.sum(e * (S - row_max[:, None]), 1), mask=in_row)
        e = exponential(of, col_high[None, :], scale)
        tl.store(col_at, tl.sum(e, 0), mask=in_col)
        tl.store(col_at + col_plane, tl.sum(e * (S - col_max[None, :]), 0), mask=in_col)


@triton.jit
def statistics_kernel(
    X, T, X_TEACHER, T_TEACHER,  # (n, d), (m, d), (n, d_teacher), (m, d_teacher)
    SCALE, TEACHER_SCALE,  # one element each
    X_LABELS, T_LABELS,  # (n,), (m,)
    ROW, COL,  # (kinds, column tiles, rows), (kinds, row tiles, m)
    PAIR,  # (2, n): S_ii, and the teacher's
    KEPT, TILES, tiles_stride,  # (heads, n, pitch), (row tiles, column tiles, 2), to that of the teacher
    row0, rows,  # this panel of the n rows; row0 is a multiple of BM
    n, m, d, d_teacher, x_stride, t_stride, x_teacher_stride, t_teacher_stride, pitch,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, TOTALS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    p, q = place(rows, m, BM, BN, GROUP)
    r = p * BM + tl.arange(0, BM)
    i, j = row0 + r, q * BN + tl.arange(0, BN)
    in_row, in_col = r < rows, j < m
    valid = in_row[:, None] & in_col[None, :]
    # Rows beyond the end are the last one again: nothing outside the matrices is read.
    i_read, j_read = tl.minimum(i, n - 1), tl.minimum(j, m - 1)
    down, across = tl.cdiv(rows, BM), tl.cdiv(m, BN)
    row_plane, col_plane = long(across) * rows, long(down) * m
    row_at, col_at = ROW + q.to(tl.int64) * rows + r, COL + p.to(tl.int64) * m + j
    # Within a tile 32 bits do, and leave registers free.
    corner = (row0 + p * long(BM)) * pitch + q * BN
    kept_at = tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
    tile_at = TILES + (p * long(across) + q) * 2
    crossed = (TARGETS != RECTANGLE) & (row0 + p * BM < (q + 1) * BN) & (q * BN < row0 + (p + 1) * BM)
    in_pair = in_row & (i >= q * BN) & (i < (q + 1) * BN)

    scale = tl.load(SCALE).to(tl.float32)
    S = product(X, T, i_read, j_read, d, x_stride, t_stride, PRECISION, BM, BN, BK)
    S = tl.where(valid, S, LOWEST)
    row_max, col_max = tl.max(S, 1), tl.max(S, 0)
    offset, step = record(tl.max(row_max, 0), S, valid, scale)
    tl.store(tile_at, offset)
    tl.store(tile_at + 1, step)
    tl.store(row_at, row_max, mask=in_row)
    tl.store(col_at, col_max, mask=in_col)
    if crossed:
        tl.store(PAIR + i, tl.sum(tl.where(i[:, None] == j[None, :], S, 0.0), 1), mask=in_pair)
    kinds: tl.constexpr = 6 if TEACHER else 3
    if TARGETS != PAIRS:
        labels = tl.load(X_LABELS + i_read)[:, None] == tl.load(T_LABELS + j_read)[None, :]
        same = tl.where(labels & valid, S, 0.0)
        tl.store(row_at + kinds * row_plane, tl.sum(same, 1), mask=in_row)
        tl.store(col_at + kinds * col_plane, tl.sum(same, 0), mask=in_col)
    if TOTALS:
        total: tl.constexpr = kinds if TARGETS == PAIRS else kinds + 1
        everything = tl.where(valid, S, 0.0)
        tl.store(row_at + total * row_plane, tl.sum(everything, 1), mask=in_row)
        tl.store(col_at + total * col_plane, tl.sum(everything, 0), mask=in_col)
    _softmax(
        S, row_max, col_max, offset, step, scale, S, row_max, col_max, offset,
        row_at + row_plane, col_at + col_plane, row_plane, col_plane, in_row, in_col, KEPT + corner, kept_at, KEEP,
    )  # fmt: skip
    if TEACHER:
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
        other = product(
            X_TEACHER, T_TEACHER, i_read, j_read, d_teacher, x_teacher_stride, t_teacher_stride, PRECISION, BM, BN, BK
        )
        other = tl.where(valid, other, LOWEST)
        row_high, col_high = tl.max(other, 1), tl.max(other, 0)
        other_offset, other_step = record(tl.max(row_high, 0), other, valid, teacher_scale)
        tl.store(tile_at + tiles_stride, other_offset)
        tl.store(tile_at + tiles_stride + 1, other_step)
        tl.store(row_at + 3 * row_plane, row_high, mask=in_row)
        tl.store(col_at + 3 * col_plane, col_high, mask=in_col)
        if crossed:
            tl.store(PAIR + n + i, tl.sum(tl.where(i[:, None] == j[None, :], other, 0.0), 1), mask=in_pair)
        _softmax(
            other, row_high, col_high, other_offset, other_step, teacher_scale, S, row_max, col_max, offset,
            row_at + 4 * row_plane, col_at + 4 * col_plane, row_plane, col_plane, in_row, in_col,
            KEPT + long(n) * pitch + corner, kept_at, KEEP,
        )  # fmt: skip
