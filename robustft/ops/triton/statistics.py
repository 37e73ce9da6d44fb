"""Softmax statistics of S = x t^T over rows and columns, and the contrastive losses they make.

    statistics_kernel   one program a tile: S in float32, its statistics by row and by column (one writer each), the
                        diagonal, and, if asked to, the tile's exponentials for the backward (tile.py)
    combine_kernel      one program for BS samples: their tiles' statistics in fixed order, and, once every row has
                        been seen, the losses and their derivatives by the scale

Statistics are those of csrc/cpu/similarity.cpp, relative to the maximum of their row or column: max, log_sum, gap,
target, total, and of the teacher max, log_sum, gap; the losses those of robustft/ops/native/contrastive.py. In columns,
before the last panel of rows, a softmax is (max, sum, weighted) with e = exp(s (S - max)), sum = sum e and
weighted = sum e (S - max); between the two kernels likewise, but a narrow tile's e is relative to the tile's offset,
which keeps the maxima out of the registers that its sums need.
"""

import triton
import triton.language as tl

from robustft.ops.triton.tile import (
    LABELS,
    LN2,
    LOG2E,
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


@triton.jit
def _relative(sums, weighted, tile_max, reference, student_max, offset, step, scale):
    """sum and weighted of tiles, narrow ones too, relative to their maxima."""
    narrow = step == 0.0
    largest = tl.where(narrow, tl.exp2((tile_max - offset) * (scale * LOG2E)), 1.0)
    weighted = (weighted + sums * tl.where(narrow, reference - student_max, 0.0)) / largest
    sums = sums / largest
    # At least its largest term: losses of hard labels are then never negative. NaN stays; tl.maximum would swallow it.
    return tl.where(sums < 1.0, 1.0, sums), weighted


@triton.jit
def _fold(
    PART, TILES, tiles, length, at, inside, tile_stride, side_stride, teacher_stride,
    scale, teacher_scale, first,  # (kinds, tiles, length), records of tiles; (8,) statistics so far
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, TOTALS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The tiles' statistics added to `first`: max, sum, weighted, target, total, and the teacher's first three."""
    highest, sums, weighted, target, total, teacher_max, teacher_sums, teacher_weighted = first
    kinds: tl.constexpr = 6 if TEACHER else 3
    plane = long(tiles) * length
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        valid = (tile < tiles)[:, None] & inside[None, :]
        here = PART + tile.to(tl.int64)[:, None] * length + at[None, :]
        record_at = TILES + tile.to(tl.int64)[:, None] * tile_stride + side_stride[None, :]
        offset = tl.load(record_at, mask=valid, other=0.0)
        step = tl.load(record_at + 1, mask=valid, other=1.0)
        tile_max = tl.load(here, mask=valid, other=float("-inf"))
        tile_sum = tl.load(here + plane, mask=valid, other=1.0)
        tile_weighted = tl.load(here + 2 * plane, mask=valid, other=0.0)
        tile_sum, tile_weighted = _relative(tile_sum, tile_weighted, tile_max, offset, tile_max, offset, step, scale)
        new_max = tl.maximum(highest, tl.max(tile_max, 0))
        # What was nothing so far must not meet -inf - -inf.
        old_shift = tl.where(highest == float("-inf"), 0.0, highest - new_max)
        shift = tl.where(valid, tile_max - new_max[None, :], 0.0)
        highest = new_max
        keep_old = tl.exp2(old_shift * (scale * LOG2E))
        keep = tl.where(valid, tl.exp2(shift * (scale * LOG2E)), 0.0)
        weighted = (weighted + sums * old_shift) * keep_old + tl.sum((tile_weighted + tile_sum * shift) * keep, 0)
        sums = sums * keep_old + tl.sum(tile_sum * keep, 0)
        if TARGETS != PAIRS:
            target += tl.sum(tl.load(here + kinds * plane, mask=valid, other=0.0), 0)
        if TOTALS:
            last: tl.constexpr = kinds if TARGETS == PAIRS else kinds + 1
            total += tl.sum(tl.load(here + last * plane, mask=valid, other=0.0), 0)
        if TEACHER:
            offset_t = tl.load(record_at + teacher_stride, mask=valid, other=0.0)
            step_t = tl.load(record_at + teacher_stride + 1, mask=valid, other=1.0)
            high = tl.load(here + 3 * plane, mask=valid, other=float("-inf"))
            tile_sum = tl.load(here + 4 * plane, mask=valid, other=1.0)
            tile_weighted = tl.load(here + 5 * plane, mask=valid, other=0.0)
            tile_sum, tile_weighted = _relative(
                tile_sum, tile_weighted, high, offset, tile_max, offset_t, step_t, teacher_scale
            )
            new_max = tl.maximum(teacher_max, tl.max(high, 0))
            old = tl.where(teacher_max == float("-inf"), 0.0, teacher_max - new_max)
            keep_old = tl.exp2(old * (teacher_scale * LOG2E))
            keep = tl.exp2(tl.where(valid, high - new_max[None, :], 0.0) * (teacher_scale * LOG2E))
            keep = tl.where(valid, keep, 0.0)
            teacher_max = new_max
            tile_weighted += tile_sum * shift
            teacher_weighted = (teacher_weighted + teacher_sums * old_shift) * keep_old + tl.sum(
                tile_weighted * keep, 0
            )
            teacher_sums = teacher_sums * keep_old + tl.sum(tile_sum * keep, 0)
    return highest, sums, weighted, target, total, teacher_max, teacher_sums, teacher_weighted


@triton.jit
def _load(STATISTICS, length, at, inside):
    """(8,) of these samples."""
    at, length = STATISTICS + at, long(length)
    return (
        tl.load(at, mask=inside), tl.load(at + length, mask=inside), tl.load(at + 2 * length, mask=inside),
        tl.load(at + 3 * length, mask=inside), tl.load(at + 4 * length, mask=inside),
        tl.load(at + 5 * length, mask=inside), tl.load(at + 6 * length, mask=inside),
        tl.load(at + 7 * length, mask=inside),
    )  # fmt: skip


@triton.jit
def _store(STATISTICS, length, at, inside, values):
    for kind in tl.static_range(8):
        tl.store(STATISTICS + kind * long(length) + at, values[kind], mask=inside)


@triton.jit
def _nothing(BS: tl.constexpr):
    none, lowest = tl.zeros((BS,), tl.float32), tl.full((BS,), float("-inf"), tl.float32)
    return lowest, none, none, none, none, lowest, none, none


@triton.jit
def _finished(of):
    """log_sum and gap in place of sum and weighted."""
    highest, sums, weighted, target, total, teacher_max, teacher_sums, teacher_weighted = of
    return (
        highest, tl.log2(sums) * LN2, weighted / sums, target, total,
        teacher_max, tl.log2(teacher_sums) * LN2, teacher_weighted / teacher_sums,
    )  # fmt: skip


@triton.jit
def combine_kernel(
    ROW_PART, COL_PART, TILES, tiles_stride,  # what statistics_kernel wrote for this panel of rows
    ROW, COL,  # (10, n) and (8, m), in (10, n) below them S_ii and the teacher's
    SCALE, TEACHER_SCALE, LABELS_AT,  # (n,)
    LOSS, DISTILLATION, BY_SCALE, COUNTS,  # (n,), (n,), (1 or 2, n), (n,)
    row0, rows, row_tiles, col_tiles, n, m, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, TOTALS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    in_row, in_col = at < n, at < m
    scale = tl.load(SCALE).to(tl.float32)
    teacher_scale = scale
    if TEACHER:
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
    # A panel is a whole number of blocks: all of these rows are in it, or none.
    if (tl.program_id(0) * BS >= row0) & (tl.program_id(0) * BS < row0 + rows):
        row = _finished(
            _fold(ROW_PART, TILES, col_tiles, rows, at - row0, in_row, 2, (at - row0) // BM * long(col_tiles) * 2,
                  tiles_stride, scale, teacher_scale, _nothing(BS), TARGETS, TEACHER, TOTALS, BT)
        )  # fmt: skip
        _store(ROW, n, at, in_row, row)
    else:
        row = _load(ROW, n, at, in_row)
    if row0 == 0:
        col = _nothing(BS)
    else:
        col = _load(COL, m, at, in_col)
    col = _fold(COL_PART, TILES, row_tiles, m, at, in_col, long(col_tiles) * 2, at // BN * 2,
                tiles_stride, scale, teacher_scale, col, TARGETS, TEACHER, TOTALS, BT)  # fmt: skip
    if row0 + rows < n:
        _store(COL, m, at, in_col, col)
    else:
        col = _finished(col)
        _store(COL, m, at, in_col, col)
        if TARGETS != RECTANGLE:
            row_max, row_log, row_gap, row_target, row_total, _, _, row_taught = row
            col_max, col_log, col_gap, col_target, col_total, _, _, col_taught = col
            if TARGETS == LABELS:
                mine = tl.load(LABELS_AT + at, mask=in_row, other=0)
                count = tl.zeros((BS,), tl.int32)
                for start in range(0, n, BC):
                    other = start + tl.arange(0, BC)
                    same = mine[:, None] == tl.load(LABELS_AT + other, mask=other < n, other=0)[None, :]
                    count += tl.sum((same & (other < n)[None, :]).to(tl.int32), 1)
                counts = count.to(tl.float32)
                tl.store(COUNTS + at, counts, mask=in_row)
                row_miss, col_miss = row_max - row_target / counts, col_max - col_target / counts
            else:
                pair = tl.load(ROW + 8 * long(n) + at, mask=in_row)
                row_miss, col_miss = row_max - pair, col_max - pair
            if TOTALS:
                row_miss += smoothing * ((row_max - row_total / n) - row_miss)
                col_miss += smoothing * ((col_max - col_total / n) - col_miss)
            loss = 0.5 * ((row_log + scale * row_miss) + (col_log + scale * col_miss))
            tl.store(LOSS + at, loss, mask=in_row)
            tl.store(BY_SCALE + at, 0.5 * ((row_gap + row_miss) + (col_gap + col_miss)), mask=in_row)
            if TEACHER:
                distillation = (row_log - scale * row_taught) + (col_log - scale * col_taught)
                tl.store(DISTILLATION + at, distillation, mask=in_row)
                tl.store(BY_SCALE + n + at, (row_gap - row_taught) + (col_gap - col_taught), mask=in_row)
