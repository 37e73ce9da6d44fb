"""Softmax statistics of a large matrix S, given in pieces; combine.py adds them up as it does those of statistics.py.

    strips_kernel   one program for BM rows of CHUNKS times BN columns, a strip, which is the tile of its records

What statistics_kernel writes of a tile, this writes of a strip: its rows' statistics once for all chunks, its columns'
chunk by chunk. Sums over rows stay in the registers that hold four neighbouring columns until the strip ends, and sums
over columns need no other lane's, but once a chunk the other warps': so a logit costs additions, where a tile that
comes from the matrix unit costs shuffles. A teacher's S is read in the same sweep, which weighs the student's with it:
either is read once.

One exponential serves rows and columns if it is known beforehand that no row or column is out of its range. With h at
least every S (the product of the largest norms) and c = max(0, h - 60 / s), e = exp(s (S - c)) never overflows; and it
is fine enough for rows and columns that hold an S of at least c - 60 / s. Those of pairs do if every S_ii is that
large, of others if h is small enough. Else the strip is wide, and so it is if the teacher's is: it is read twice, and
its exponentials are relative to its rows' maxima and, chunk by chunk, to its columns'.
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
)

SPAN = tl.constexpr(60.0)  # of logits, up and down from the centre
DEPTH = tl.constexpr(80.0)  # exponentials below the centre are still numbers that far, and no row's sum is made of them


@triton.jit
def _fours(values, BM: tl.constexpr, BN: tl.constexpr):
    return tl.reshape(values, [BM, BN // 4, 4])


@triton.jit
def _by_warp(values, MAXIMUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr):
    """(WARPS, BN): the maximum or sum of each column over the rows of one warp, which are all in one lane's registers,
    since a block's rows go round the warps."""
    of_warps = tl.reshape(values, [BM // WARPS, WARPS, BN])
    return tl.max(of_warps, 0) if MAXIMUM else tl.sum(of_warps, 0)


@triton.jit
def _down(by_warp, MAXIMUM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr):
    """That of all rows: WARPS numbers go to the lane that adds them up. A reduction of Triton's would take shuffles,
    and twice the barriers."""
    left = tl.trans(by_warp)
    for k in tl.static_range(4):
        if (WARPS >> k) > 1:
            left = tl.reshape(left, [BN, 2] if (WARPS >> k) == 2 else [BN, WARPS >> (k + 1), 2])
            a, b = tl.split(left)
            left = tl.maximum(a, b) if MAXIMUM else a + b
    return tl.reshape(left, [BN])


@triton.jit
def _centre(X_NORM, T_NORM, PAIR_LEAST, scale, TARGETS: tl.constexpr):
    """c, whether the strip is narrow, and the least maximum that its rows and columns are said to have."""
    high = tl.load(X_NORM).to(tl.float32) * tl.load(T_NORM).to(tl.float32) * 1.001  # rounded norms
    per_nat = 1.0 / tl.maximum(scale, 1e-30)
    centre = tl.maximum(high - SPAN * per_nat, 0.0)
    if TARGETS == RECTANGLE:
        least = -high
    else:
        least = tl.load(PAIR_LEAST).to(tl.float32)
    narrow = ((least - centre) * scale >= -SPAN) & (high < 1e30)  # not of NaN or Inf
    return centre, narrow, tl.where(narrow, centre - DEPTH * per_nat, float("-inf"))


@triton.jit
def _add_chunk(
    of, weigh, e, highest, sums, weighted, COL, col_plane, in_col, floor,
    BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What a narrow chunk adds to its rows' statistics; writes those of its columns. All that needs the chunk stands
    before the first barrier, which registers that are still needed would have to pass."""
    col_high, col_sums = _by_warp(of, True, BM, BN, WARPS), _by_warp(e, False, BM, BN, WARPS)
    col_weighted = _by_warp(weigh, False, BM, BN, WARPS)
    highest = tl.maximum(highest, tl.max(_fours(of, BM, BN), 2))
    sums += tl.sum(_fours(e, BM, BN), 2)
    weighted += tl.sum(_fours(weigh, BM, BN), 2)
    tl.store(COL, tl.maximum(_down(col_high, True, BN, WARPS), floor), mask=in_col)
    tl.store(COL + col_plane, _down(col_sums, False, BN, WARPS), mask=in_col)
    tl.store(COL + 2 * col_plane, _down(col_weighted, False, BN, WARPS), mask=in_col)
    return highest, sums, weighted


@triton.jit
def _store_rows(ROW, row_plane, in_row, high, sums, weighted, BM: tl.constexpr):
    at = ROW + tl.arange(0, BM)
    tl.store(at, high, mask=in_row)
    tl.store(at + row_plane, tl.sum(sums, 1), mask=in_row)
    tl.store(at + 2 * row_plane, tl.sum(weighted, 1), mask=in_row)


@triton.jit
def _narrow(
    S, S_TEACHER, KEPT, ROW, COL, TILE,  # all at this strip
    scale, centre, floor, teacher_scale, teacher_centre, teacher_floor,
    kept_plane, tiles_stride, row_plane, col_plane, in_row, cols_left, chunks, pitch,
    TEACHER: tl.constexpr, KEEP: tl.constexpr, STRIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Writes max, sum and weighted of rows and columns, and, in the same sweep, those of the teacher; keeps the strip.
    Weighted are the student's S, relative to its centre, as sums of either matrix are relative to its own."""
    r, c = tl.arange(0, BM)[:, None], tl.arange(0, BN)
    highest, none = tl.full((BM, BN // 4), LOWEST, tl.float32), tl.zeros((BM, BN // 4), tl.float32)
    sums, weighted = none, none
    taught_highest, taught_sums, taught_weighted = highest, none, none
    tl.store(TILE, centre)
    tl.store(TILE + 1, 0.0)
    if TEACHER:
        tl.store(TILE + tiles_stride, teacher_centre)
        tl.store(TILE + tiles_stride + 1, 0.0)
    rim = (tl.min(in_row.to(tl.int32), 0) == 0) | (cols_left < chunks * BN)
    for chunk in range(chunks):
        j = chunk * BN + c
        in_col = j < cols_left
        # Whole blocks are read, whose rims outside the matrix nobody wrote: a masked load would cost an instruction
        # for each of all entries. Both matrices' before either is used, since no load is moved over a barrier.
        of = tl.load(S + r * STRIDE + j[None, :])
        taught = of
        if TEACHER:
            taught = tl.load(S_TEACHER + r * STRIDE + j[None, :])
        valid = in_row[:, None] & in_col[None, :]
        if rim:
            of = tl.where(valid, of, LOWEST)
            if TEACHER:
                taught = tl.where(valid, taught, LOWEST)
        # Told so, a lane keeps the four columns that it loads, also where eight of 16 bits would make a wider store:
        # else two lanes have each column.
        kept_at = tl.max_contiguous(r * pitch + j[None, :], [1, 4])
        e = exponential(of, centre, scale)
        if KEEP:
            keep_narrow(KEPT, kept_at, valid, e)
        highest, sums, weighted = _add_chunk(
            of, e * (of - centre), e, highest, sums, weighted, COL + j, col_plane, in_col, floor, BM, BN, WARPS
        )
        if TEACHER:
            e = exponential(taught, teacher_centre, teacher_scale)
            if KEEP:
                keep_narrow(KEPT + kept_plane, kept_at, valid, e)
            taught_highest, taught_sums, taught_weighted = _add_chunk(
                taught, e * (of - centre), e, taught_highest, taught_sums, taught_weighted,
                COL + 3 * col_plane + j, col_plane, in_col, teacher_floor, BM, BN, WARPS,
            )  # fmt: skip
    _store_rows(ROW, row_plane, in_row, tl.maximum(tl.max(highest, 1), floor), sums, weighted, BM)
    if TEACHER:
        high = tl.maximum(tl.max(taught_highest, 1), teacher_floor)
        _store_rows(ROW + 3 * row_plane, row_plane, in_row, high, taught_sums, taught_weighted, BM)


@triton.jit
def _wide(
    OF, S, KEPT, ROW, COL, TILE,  # the softmax's matrix and the one that it weighs, all at this strip
    scale, s_row_high,  # of the softmax; the weighed one's maxima of rows
    row_plane, col_plane, in_row, cols_left, chunks, pitch,
    OTHER: tl.constexpr, KEEP: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes the same of one matrix, weighted relative to the maxima of S, OTHER than the softmax's or its own; returns
    its rows' maxima."""
    r, c = tl.arange(0, BM)[:, None], tl.arange(0, BN)
    highest = tl.full((BM, BN // 4), LOWEST, tl.float32)
    sums, weighted = tl.zeros((BM, BN // 4), tl.float32), tl.zeros((BM, BN // 4), tl.float32)
    least = tl.full((BM, BN // 4), float("inf"), tl.float32)
    for chunk in range(chunks):
        j = chunk * BN + c
        valid = in_row[:, None] & (j < cols_left)[None, :]
        of = tl.load(OF + r * STRIDE + j[None, :], mask=valid, other=LOWEST)
        highest = tl.maximum(highest, tl.max(_fours(of, BM, BN), 2))
        least = tl.minimum(least, tl.min(_fours(tl.where(valid, of, float("inf")), BM, BN), 2))
    row_high, offset = tl.max(highest, 1), tl.min(tl.min(least, 1), 0)
    # As of a wide tile (tile.py); a step of 0 would say that it is narrow.
    step = tl.maximum((tl.max(row_high, 0) - offset) / 65535.0, 1e-30)
    tl.store(TILE, offset)
    tl.store(TILE + 1, step)
    s_row = s_row_high if OTHER else row_high
    for chunk in range(chunks):
        j = chunk * BN + c
        in_col = j < cols_left
        valid = in_row[:, None] & in_col[None, :]
        of = tl.load(OF + r * STRIDE + j[None, :], mask=valid, other=LOWEST)
        if KEEP:
            keep_wide(KEPT, tl.max_contiguous(r * pitch + j[None, :], [1, 4]), valid, of, offset, step)
        weigh = of
        if OTHER:
            weigh = tl.load(S + r * STRIDE + j[None, :], mask=valid, other=LOWEST)
        e = exponential(of, row_high[:, None], scale)
        sums += tl.sum(_fours(e, BM, BN), 2)
        weighted += tl.sum(_fours(e * (weigh - s_row[:, None]), BM, BN), 2)
        col_high = tl.max(of, 0)
        e = exponential(of, col_high[None, :], scale)
        tl.store(COL + j, col_high, mask=in_col)
        tl.store(COL + col_plane + j, tl.sum(e, 0), mask=in_col)
        s_col = tl.max(weigh, 0)
        tl.store(COL + 2 * col_plane + j, tl.sum(e * (weigh - s_col[None, :]), 0), mask=in_col)
    _store_rows(ROW, row_plane, in_row, row_high, sums, weighted, BM)
    return row_high


@triton.jit
def _targets(
    S, X_LABELS, T_LABELS, i0, j0, ROW, COL, row_plane, col_plane, in_row, cols_left, chunks,
    TARGETS: tl.constexpr, TOTALS: tl.constexpr, STRIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Writes the sums of S over entries of the same label, unless those are pairs, and, if asked to, over all."""
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    same, total = tl.zeros((BM, BN // 4), tl.float32), tl.zeros((BM, BN // 4), tl.float32)
    for chunk in range(chunks):
        j = chunk * BN + c
        in_col = j < cols_left
        every = tl.load(S + r[:, None] * STRIDE + j[None, :], mask=in_row[:, None] & in_col[None, :], other=0.0)
        at = COL + j
        if TARGETS != PAIRS:
            x_label = tl.load(X_LABELS + i0 + r, mask=in_row, other=0)
            t_label = tl.load(T_LABELS + j0 + j, mask=in_col, other=0)
            mine = tl.where(x_label[:, None] == t_label[None, :], every, 0.0)
            same += tl.sum(_fours(mine, BM, BN), 2)
            tl.store(at, _down(_by_warp(mine, False, BM, BN, WARPS), False, BN, WARPS), mask=in_col)
            at += col_plane
        if TOTALS:
            total += tl.sum(_fours(every, BM, BN), 2)
            tl.store(at, _down(_by_warp(every, False, BM, BN, WARPS), False, BN, WARPS), mask=in_col)
    at = ROW + r
    if TARGETS != PAIRS:
        tl.store(at, tl.sum(same, 1), mask=in_row)
        at += row_plane
    if TOTALS:
        tl.store(at, tl.sum(total, 1), mask=in_row)


@triton.jit(do_not_specialize=["row_tile", "col_tile"])
def strips_kernel(
    S, S_TEACHER, STRIDE: tl.constexpr,  # (piece rows, piece columns)
    X_NORM, T_NORM, PAIR_LEAST, SCALE,  # one element each: the largest norms, the least S_ii, the scale
    X_TEACHER_NORM, T_TEACHER_NORM, TEACHER_LEAST, TEACHER_SCALE,
    X_LABELS, T_LABELS,  # (n,), (m,)
    ROW, COL,  # (kinds, strips, rows), (kinds, row tiles, m)
    PAIR,  # (2, n): S_ii, and the teacher's
    KEPT, TILES, tiles_stride,  # (heads, n, pitch), (row tiles, strips, 2), to that of the teacher
    row0, rows,  # this panel of the n rows; row0 is a multiple of BM
    row_tile, col_tile, piece_rows, piece_cols,  # this piece of the panel: its first tile and strip, its size
    n, m, pitch,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, TOTALS: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BN * CHUNKS
    across_here = tl.cdiv(piece_cols, WIDTH)
    p_here, q_here = tl.program_id(0) // across_here, tl.program_id(0) % across_here
    p, q = row_tile + p_here, col_tile + q_here
    at = p * BM + tl.arange(0, BM)  # in the panel
    in_row = at < rows
    i, j0 = row0 + at, q * WIDTH
    cols_left = m - j0
    chunks = tl.cdiv(tl.minimum(cols_left, WIDTH), BN)  # not a constant, or they were unrolled into all registers
    down, across = tl.cdiv(rows, BM), tl.cdiv(m, WIDTH)
    # A panel's strips are few enough for 32 bits (configs.py), and its columns' tiles are not.
    row_plane, col_plane = across * rows, long(down) * m
    ROW += q * rows + p * BM
    COL += p * long(m) + j0
    KEPT += (row0 + p * BM) * long(pitch) + j0
    TILES += (p * long(across) + q) * 2
    here = p_here * long(BM) * STRIDE + q_here * WIDTH
    S += here
    if TARGETS != RECTANGLE:
        in_pair = in_row & (i >= j0) & (i < j0 + WIDTH)
        pair_at = tl.arange(0, BM) * STRIDE + (i - j0)
        tl.store(PAIR + i, tl.load(S + pair_at, mask=in_pair), mask=in_pair)
    scale = tl.load(SCALE).to(tl.float32)
    centre, narrow, floor = _centre(X_NORM, T_NORM, PAIR_LEAST, scale, TARGETS)
    teacher_scale, teacher_centre, teacher_floor, kept_plane = scale, centre, floor, long(n) * pitch
    if TEACHER:
        S_TEACHER += here
        if TARGETS != RECTANGLE:
            tl.store(PAIR + n + i, tl.load(S_TEACHER + pair_at, mask=in_pair), mask=in_pair)
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
        teacher_centre, teacher_narrow, teacher_floor = _centre(
            X_TEACHER_NORM, T_TEACHER_NORM, TEACHER_LEAST, teacher_scale, TARGETS
        )
        narrow = narrow & teacher_narrow
    if narrow:
        _narrow(
            S, S_TEACHER, KEPT, ROW, COL, TILES, scale, centre, floor, teacher_scale, teacher_centre, teacher_floor,
            kept_plane, tiles_stride, row_plane, col_plane, in_row, cols_left, chunks, pitch,
            TEACHER, KEEP, STRIDE, BM, BN, WARPS,
        )  # fmt: skip
    else:
        row_high = _wide(
            S, S, KEPT, ROW, COL, TILES, scale, 0.0,
            row_plane, col_plane, in_row, cols_left, chunks, pitch, False, KEEP, STRIDE, BM, BN,
        )  # fmt: skip
        if TEACHER:
            _wide(
                S_TEACHER, S, KEPT + kept_plane, ROW + 3 * row_plane, COL + 3 * col_plane, TILES + tiles_stride,
                teacher_scale, row_high,
                row_plane, col_plane, in_row, cols_left, chunks, pitch, True, KEEP, STRIDE, BM, BN,
            )  # fmt: skip
    kinds: tl.constexpr = 6 if TEACHER else 3
    if (TARGETS != PAIRS) or TOTALS:
        _targets(
            S, X_LABELS, T_LABELS, row0 + p * BM, j0, ROW + kinds * row_plane, COL + kinds * col_plane,
            row_plane, col_plane, in_row, cols_left, chunks, TARGETS, TOTALS, STRIDE, BM, BN, WARPS,
        )  # fmt: skip
