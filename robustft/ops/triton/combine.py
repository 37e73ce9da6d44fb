"""Softmax statistics of S = x t^T over rows and columns from those of its tiles, and the contrastive losses they make.

    combine_kernel      one program for BS samples: their tiles' statistics (statistics.py) in fixed order, and, once
                        every row has been seen, the losses and their derivatives by the scale

Statistics are those of robustft/ops/similarity.py in their order, relative to the maximum of their row or column: max,
log_sum, gap, target, total, and of the teacher max, log_sum, gap; the losses those of robustft/ops/contrastive.py. In
columns, before the last panel of rows, a softmax is (max, sum, weighted) as it is of tiles.
"""

import triton
import triton.language as tl

from robustft.ops.triton.tile import LABELS, LN2, LOG2E, PAIRS, RECTANGLE, long


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
