"""What stands between the library's products of a large matrix's backward (products.py): G, and the diagonal's share.

weights_kernel    a piece of G of gradient.py in the features' dtype, one program a tile, from the tile as kept or
                  from S in float32; 0 on the diagonal
finish_kernel     dx and dt from G t and G^T x in float32: the diagonal added as in gradient.py, scaled, rounded; ds
"""

import triton
import triton.language as tl

from robustft.ops.triton.gradient import head, scale_gradient, side, with_itself
from robustft.ops.triton.tile import PAIRS, RECTANGLE, long


@triton.jit(do_not_specialize=["row0", "col0"])
def weights_kernel(
    KEPT, TILES,  # (heads, n, pitch), (heads, row tiles, column tiles, 2), of the whole matrix, if it is kept
    S_GIVEN, S_TEACHER, given_stride,  # (rows, cols) of S and of the teacher's, if not
    WEIGHTS, weights_stride,  # (rows, cols)
    X_LABELS, T_LABELS, SCALE, TEACHER_SCALE,  # (n,), (m,), one element each
    ROW, COL, COUNTS, G, H,  # as gradient_kernel's
    row0, rows, col0, cols,  # this piece
    n, m, pitch, g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, GIVEN: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,  # row0, col0: multiples of those
):  # fmt: skip
    across_here = tl.cdiv(cols, BN)
    p, q = tl.program_id(0) // across_here, tl.program_id(0) % across_here
    r, c = p * BM + tl.arange(0, BM), q * BN + tl.arange(0, BN)
    in_row, in_col = r < rows, c < cols
    valid = in_row[:, None] & in_col[None, :]
    i, j = row0 + r, col0 + c
    scale = tl.load(SCALE).to(tl.float32)
    own_max, own_log, own_a, own_b, own_u, own_tmax, own_tlog, own_c = side(
        ROW, n, i, in_row, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
    )
    other_max, other_log, other_a, other_b, other_u, other_tmax, other_tlog, other_c = side(
        COL, m, j, in_col, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
    )
    down, across = tl.cdiv(n, TILE_M), tl.cdiv(m, TILE_N)
    tile_at = TILES + ((row0 + p * BM) // TILE_M * long(across) + (col0 + q * BN) // TILE_N) * 2
    kept_at = (row0 + p * BM) * long(pitch) + (col0 + q * BN)
    kept_at += tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
    given_at = p * long(BM) * given_stride + q * BN
    given_at += tl.arange(0, BM)[:, None] * given_stride + tl.arange(0, BN)[None, :]
    if GIVEN:
        # A plane of 32 bits whose step says "wide" is S itself.
        S = tl.load(S_GIVEN + given_at, mask=valid, other=0.0)
        g = head(S, own_a, own_max, own_log, other_a, other_max, other_log, 0.0, 1.0, scale)
    else:
        kept = tl.load(KEPT + kept_at, mask=valid, other=0.0)
        offset, step = tl.load(tile_at), tl.load(tile_at + 1)
        g = head(kept, own_a, own_max, own_log, other_a, other_max, other_log, offset, step, scale)
    if TEACHER:
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
        if GIVEN:
            S = tl.load(S_TEACHER + given_at, mask=valid, other=0.0)
            g -= head(S, own_c, own_tmax, own_tlog, other_c, other_tmax, other_tlog, 0.0, 1.0, teacher_scale)
        else:
            kept = tl.load(KEPT + long(n) * pitch + kept_at, mask=valid, other=0.0)
            tile_at += long(down) * across * 2
            offset, step = tl.load(tile_at), tl.load(tile_at + 1)
            g -= head(kept, own_c, own_tmax, own_tlog, other_c, other_tmax, other_tlog, offset, step, teacher_scale)
    if TARGETS != PAIRS:
        own_label = tl.load(X_LABELS + i, mask=in_row, other=0)
        other_label = tl.load(T_LABELS + j, mask=in_col, other=0)
        g -= tl.where(own_label[:, None] == other_label[None, :], own_b[:, None] + other_b[None, :], 0.0)
    if SMOOTHED:
        g -= own_u[:, None] + other_u[None, :]
    if TARGETS != RECTANGLE:
        g = tl.where(i[:, None] == j[None, :], 0.0, g)
    out = p * long(BM) * weights_stride + q * BN
    out += tl.arange(0, BM)[:, None] * weights_stride + tl.arange(0, BN)[None, :]
    tl.store(WEIGHTS + out, g.to(WEIGHTS.dtype.element_ty), mask=valid)


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
