"""What stands between the library's products of a large matrix's backward (products.py): G, and the diagonal's share.

factors_kernel    of each row and column what G multiplies or subtracts, once for all pieces
weights_kernel    a piece of G of gradient.py in the features' dtype, one program for CHUNKS times BM rows of BN
                  columns, from what is kept or from S in float32; 0 on the diagonal
finish_kernel     dx and dt from G t and G^T x in float32: the diagonal added as in gradient.py, scaled, rounded; ds

Kept strips are narrow all together (strips.py), the teacher's with them, relative to one centre. So the factors f of

    G = e (f + f') - [same label](b + b') - (u + u') - e_t (f_t + f_t')

are numbers of a row or a column whatever the strip, and a logit costs an addition, a product and its rounding.
"""

import triton
import triton.language as tl

from robustft.ops.triton.gradient import _factor, head, scale_gradient, side, with_itself
from robustft.ops.triton.tile import PAIRS, RECTANGLE, kept_similarity, long


@triton.jit
def _factors(
    OF, FACTORS, length, block, G, H, g_stride, h_stride, COUNTS, n, smoothing,
    scale, offset, teacher_scale, teacher_offset,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    i = block * BS + tl.arange(0, BS)
    inside = i < length
    highest, log_sum, a, b, u, teacher_max, teacher_log, c = side(
        OF, length, i, inside, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
    )
    at, plane = FACTORS + i, long(length)
    tl.store(at, _factor(a, highest, log_sum, offset, scale), mask=inside)
    tl.store(at + plane, b, mask=inside)
    tl.store(at + 2 * plane, u, mask=inside)
    if TEACHER:
        tl.store(at + 3 * plane, _factor(c, teacher_max, teacher_log, teacher_offset, teacher_scale), mask=inside)


@triton.jit
def factors_kernel(
    TILES, tiles_stride, SCALE, TEACHER_SCALE,  # records, to those of the teacher; one element each
    ROW, COL, COUNTS, G, H,  # as gradient_kernel's
    ROW_FACTORS, COL_FACTORS,  # (4, n), (4, m): f, b, u and f_t
    n, m, g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, GIVEN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    scale, offset = tl.load(SCALE).to(tl.float32), 0.0
    teacher_scale, teacher_offset = scale, 0.0
    if TEACHER:
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
    if not GIVEN:
        offset = tl.load(TILES)
        if TEACHER:
            teacher_offset = tl.load(TILES + tiles_stride)
    of_rows = tl.cdiv(n, BS)
    if pid < of_rows:
        _factors(
            ROW, ROW_FACTORS, n, pid, G, H, g_stride, h_stride, COUNTS, n, smoothing,
            scale, offset, teacher_scale, teacher_offset, TARGETS, TEACHER, SMOOTHED, BS,
        )  # fmt: skip
    else:
        _factors(
            COL, COL_FACTORS, m, pid - of_rows, G, H, g_stride, h_stride, COUNTS, n, smoothing,
            scale, offset, teacher_scale, teacher_offset, TARGETS, TEACHER, SMOOTHED, BS,
        )  # fmt: skip


@triton.jit
def _of_statistics(
    S, ROW, COL, COUNTS, G, H, i, j, in_row, in_col, n, m, g_stride, h_stride, smoothing, scale,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, OF_TEACHER: tl.constexpr,
):  # fmt: skip
    """The softmaxes' part of G, or the teacher's, where no exponential serves both sides."""
    own_max, own_log, own_a, _, _, own_tmax, own_tlog, own_c = side(
        ROW, n, i, in_row, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
    )
    other_max, other_log, other_a, _, _, other_tmax, other_tlog, other_c = side(
        COL, m, j, in_col, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
    )
    # A plane of 32 bits whose step says "wide" is S itself.
    if OF_TEACHER:
        return head(S, own_c, own_tmax, own_tlog, other_c, other_tmax, other_tlog, 0.0, 1.0, scale)
    else:
        return head(S, own_a, own_max, own_log, other_a, other_max, other_log, 0.0, 1.0, scale)


@triton.jit(do_not_specialize=["row0", "col0"])
def weights_kernel(
    KEPT, TILES,  # (heads, n, pitch), (heads, row tiles, column tiles, 2), of the whole matrix, if it is kept
    S_GIVEN, S_TEACHER, given_stride,  # (rows, cols) of S and of the teacher's, if not
    WEIGHTS, weights_stride,  # (rows, cols)
    ROW_FACTORS, COL_FACTORS,  # of factors_kernel
    X_LABELS, T_LABELS, SCALE, TEACHER_SCALE,  # (n,), (m,), one element each
    ROW, COL, COUNTS, G, H,  # as gradient_kernel's
    row0, rows, col0, cols,  # this piece
    n, m, pitch, g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, GIVEN: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,  # row0, col0: multiples of those
    BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    across_here = tl.cdiv(cols, BN)
    p, q = tl.program_id(0) // across_here * CHUNKS, tl.program_id(0) % across_here
    c = q * BN + tl.arange(0, BN)
    in_col, j = c < cols, col0 + c
    scale = tl.load(SCALE).to(tl.float32)
    down, across = tl.cdiv(n, TILE_M), tl.cdiv(m, TILE_N)
    # Within a tile 32 bits do.
    r, s = tl.arange(0, BM), tl.arange(0, BN)
    kept_at = r[:, None] * pitch + s[None, :]
    given_at = r[:, None] * given_stride + s[None, :]
    out_at = r[:, None] * weights_stride + s[None, :]
    if GIVEN:
        S_GIVEN += p * long(BM) * given_stride + q * BN
        S_TEACHER += p * long(BM) * given_stride + q * BN
    else:
        KEPT += (row0 + p * BM) * long(pitch) + (col0 + q * BN)
    WEIGHTS += p * long(BM) * weights_stride + q * BN
    other_at = COL_FACTORS + j
    other = tl.load(other_at, mask=in_col, other=0.0)[None, :]
    if TARGETS != PAIRS:
        other_target = tl.load(other_at + m, mask=in_col, other=0.0)[None, :]
        other_label = tl.load(T_LABELS + j, mask=in_col, other=0)[None, :]
    if SMOOTHED:
        other_uniform = tl.load(other_at + 2 * long(m), mask=in_col, other=0.0)[None, :]
    if TEACHER:
        other_taught = tl.load(other_at + 3 * long(m), mask=in_col, other=0.0)[None, :]
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
    for chunk in range(tl.minimum(CHUNKS, tl.cdiv(rows, BM) - p)):
        first = (p + chunk) * BM
        in_row = first + r < rows
        i = row0 + first + r
        valid = in_row[:, None] & in_col[None, :]
        own_at = ROW_FACTORS + i
        tile_at = TILES + ((row0 + first) // TILE_M * long(across) + (col0 + q * BN) // TILE_N) * 2
        if GIVEN:
            S = tl.load(S_GIVEN + given_at, mask=valid, other=0.0)
            g = _of_statistics(
                S, ROW, COL, COUNTS, G, H, i, j, in_row, in_col, n, m, g_stride, h_stride, smoothing, scale,
                TARGETS, TEACHER, SMOOTHED, False,
            )  # fmt: skip
            if TEACHER:
                S = tl.load(S_TEACHER + given_at, mask=valid, other=0.0)
                g -= _of_statistics(
                    S, ROW, COL, COUNTS, G, H, i, j, in_row, in_col, n, m, g_stride, h_stride, smoothing,
                    teacher_scale, TARGETS, TEACHER, SMOOTHED, True,
                )  # fmt: skip
        else:
            kept = tl.load(KEPT + kept_at, mask=valid, other=0.0)
            if TEACHER:
                taught = tl.load(KEPT + long(n) * pitch + kept_at, mask=valid, other=0.0)
            step = tl.load(tile_at + 1)
            if step == 0.0:
                g = kept.to(tl.float32) * (tl.load(own_at, mask=in_row, other=0.0)[:, None] + other)
                if TEACHER:
                    own = tl.load(own_at + 3 * long(n), mask=in_row, other=0.0)
                    g -= taught.to(tl.float32) * (own[:, None] + other_taught)
            else:
                g = _of_statistics(
                    kept_similarity(kept, tl.load(tile_at), step), ROW, COL, COUNTS, G, H, i, j, in_row, in_col, n, m,
                    g_stride, h_stride, smoothing, scale, TARGETS, TEACHER, SMOOTHED, False,
                )  # fmt: skip
                if TEACHER:
                    tile_at += long(down) * across * 2
                    S = kept_similarity(taught, tl.load(tile_at), tl.load(tile_at + 1))
                    g -= _of_statistics(
                        S, ROW, COL, COUNTS, G, H, i, j, in_row, in_col, n, m, g_stride, h_stride, smoothing,
                        teacher_scale, TARGETS, TEACHER, SMOOTHED, True,
                    )  # fmt: skip
        if TARGETS != PAIRS:
            own_target = tl.load(own_at + n, mask=in_row, other=0.0)
            own_label = tl.load(X_LABELS + i, mask=in_row, other=0)
            g -= tl.where(own_label[:, None] == other_label, own_target[:, None] + other_target, 0.0)
        if SMOOTHED:
            g -= tl.load(own_at + 2 * long(n), mask=in_row, other=0.0)[:, None] + other_uniform
        tl.store(WEIGHTS + out_at, g.to(WEIGHTS.dtype.element_ty), mask=valid)
        if TARGETS != RECTANGLE:
            tl.debug_barrier()  # after what was written there
            on = i - (col0 + q * BN)
            zero = tl.zeros((BM,), WEIGHTS.dtype.element_ty)
            tl.store(WEIGHTS + r * weights_stride + on, zero, mask=in_row & (on >= 0) & (on < BN))
        if GIVEN:
            S_GIVEN += BM * long(given_stride)
            S_TEACHER += BM * long(given_stride)
        else:
            KEPT += BM * long(pitch)
        WEIGHTS += BM * long(weights_stride)


@triton.jit
def _finish(
    SUMS, OTHER, OUT, OWN_OF, OTHER_OF, COUNTS, PAIR, G, H, length, other_length, n, d, other_stride, block, part,
    scale, teacher_scale, g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = block * BM + tl.arange(0, BM)
    inside = i < length
    k = part * BD + tl.arange(0, BD)
    mask = inside[:, None] & (k < d)[None, :]
    at = i.to(tl.int64)[:, None] * d + k[None, :]
    acc = tl.load(SUMS + at, mask=mask, other=0.0)
    if TARGETS != RECTANGLE:
        own = side(
            OWN_OF, length, i, inside, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
        )
        on = with_itself(
            own, OTHER_OF, other_length, i, inside, inside, PAIR, n, scale, teacher_scale,
            G, H, g_stride, h_stride, COUNTS, smoothing, TARGETS, TEACHER, SMOOTHED,
        )  # fmt: skip
        twin = tl.load(OTHER + i.to(tl.int64)[:, None] * other_stride + k[None, :], mask=mask, other=0.0)
        acc += on[:, None] * twin.to(tl.float32)
    tl.store(OUT + at, (acc * scale).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    X, T, SCALE, TEACHER_SCALE,  # (n, d), (m, d), one element each
    X_SUMS, T_SUMS,  # G t (n, d) and G^T x (m, d) without the diagonal, float32
    ROW, COL, PAIR, COUNTS, G, H, BY_SCALE, DX, DT, DS,  # as gradient_kernel's
    n, m, d, x_stride, t_stride, g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    scale = tl.load(SCALE).to(tl.float32)
    teacher_scale = scale
    if TEACHER:
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
    parts = tl.cdiv(d, BD)
    of_x, of_t = tl.cdiv(n, BM) * parts, tl.cdiv(m, BM) * parts
    if pid < of_x:
        _finish(
            X_SUMS, T, DX, ROW, COL, COUNTS, PAIR, G, H, n, m, n, d, t_stride, pid // parts, pid % parts,
            scale, teacher_scale, g_stride, h_stride, smoothing, TARGETS, TEACHER, SMOOTHED, BM, BD,
        )  # fmt: skip
    elif pid < of_x + of_t:
        _finish(
            T_SUMS, X, DT, COL, ROW, COUNTS, PAIR, G, H, m, n, n, d, x_stride, (pid - of_x) // parts,
            (pid - of_x) % parts, scale, teacher_scale, g_stride, h_stride, smoothing,
            TARGETS, TEACHER, SMOOTHED, BM, BD,
        )  # fmt: skip
    else:
        scale_gradient(G, H, BY_SCALE, DS, n, g_stride, h_stride, TEACHER, 1024)
