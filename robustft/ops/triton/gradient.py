"""Gradients of the features from the statistics and exponentials of S = x t^T.

    keep_kernel       the exponentials of a panel of rows again, for a backward that was not allowed to keep them
    gradient_kernel   dx = s G t and dt = s G^T x in one launch, one program a (BM, BD) block of either; ds

With e = exp(s (S - c)) of a narrow tile (tile.py), and max, log_sum, a, b, u of the own side and of the other,

    G = e (f + f') - [same label](b + b') - (u + u') - e_t (f_t + f_t'),    f = a exp(s (c - max) - log_sum)

so that after the forward's one exponential a logit costs an addition and a multiplication, made in registers on the
way to the matrix unit. The diagonal, where p and its target cancel, is left out of the product; its G comes from the
float32 S_ii and multiplies its row in float32 at the end.
"""

import triton
import triton.language as tl

from robustft.ops.triton.tile import (
    LABELS,
    LOG2E,
    LOWEST,
    PAIRS,
    RECTANGLE,
    exponential,
    keep_narrow,
    keep_wide,
    kept_similarity,
    long,
    place,
    product,
    record,
)


@triton.jit
def keep_kernel(
    X, T, SCALE,  # (n, d), (m, d), one element
    KEPT, TILES,  # (rows, pitch), (row tiles, column tiles, 2)
    row0, rows, n, m, d, x_stride, t_stride, pitch,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    p, q = place(rows, m, BM, BN, GROUP)
    r, j = p * BM + tl.arange(0, BM), q * BN + tl.arange(0, BN)
    valid = (r < rows)[:, None] & (j < m)[None, :]
    scale = tl.load(SCALE).to(tl.float32)
    i = tl.minimum(row0 + r, n - 1)
    S = product(X, T, i, tl.minimum(j, m - 1), d, x_stride, t_stride, PRECISION, BM, BN, BK)
    high = tl.max(tl.max(tl.where(valid, S, LOWEST), 1), 0)
    offset, step = record(high, S, valid, scale)
    KEPT += p * long(BM) * pitch + q * BN
    at = tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
    if step == 0.0:
        keep_narrow(KEPT, at, valid, exponential(S, offset, scale))
    else:
        keep_wide(KEPT, at, valid, S, offset, step)
    tile_at = TILES + (p * long(tl.cdiv(m, BN)) + q) * 2
    tl.store(tile_at, offset)
    tl.store(tile_at + 1, step)


@triton.jit
def side(
    OF, length, at, inside,  # statistics, or in a rectangle coefficients, (8, length) either
    G, H, g_stride, h_stride, COUNTS, entries, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """max, log_sum, a, b, u, and the teacher's max, log_sum, c: `Coefficients` of ops/similarity.py. Outside the
    matrix log_sum is infinite, and the rest 0."""
    place_of = OF + at
    plane = long(length)
    highest = tl.load(place_of, mask=inside, other=0.0)
    log_sum = tl.load(place_of + plane, mask=inside, other=float("inf"))
    uniform, teacher_max, teacher_log, teacher = highest * 0.0, highest, log_sum, highest
    if TEACHER:
        teacher_max = tl.load(place_of + 5 * plane, mask=inside, other=0.0)
        teacher_log = tl.load(place_of + 6 * plane, mask=inside, other=float("inf"))
    if TARGETS == RECTANGLE:
        softmax = tl.load(place_of + 2 * plane, mask=inside, other=0.0)
        target = tl.load(place_of + 3 * plane, mask=inside, other=0.0)
        if SMOOTHED:
            uniform = tl.load(place_of + 4 * plane, mask=inside, other=0.0)
        if TEACHER:
            teacher = tl.load(place_of + 7 * plane, mask=inside, other=0.0)
    else:
        softmax = 0.5 * tl.load(G + at * long(g_stride), mask=inside, other=0.0).to(tl.float32)
        target = softmax
        if SMOOTHED:
            # Not softmax * (1 - smoothing): fused with the difference below, that would not be the target's own.
            target = softmax - softmax * smoothing
            uniform = (softmax - target) / entries
        if TARGETS == LABELS:
            target = target / tl.load(COUNTS + at, mask=inside, other=1.0)
        if TEACHER:
            teacher = tl.load(H + at * long(h_stride), mask=inside, other=0.0).to(tl.float32)
            softmax += teacher
    return highest, log_sum, softmax, target, uniform, teacher_max, teacher_log, teacher


@triton.jit
def _factor(coefficient, highest, log_sum, offset, scale):
    """What e, relative to the offset, is multiplied with to be coefficient * p."""
    return coefficient * tl.exp2(((offset - highest) * scale - log_sum) * LOG2E)


@triton.jit
def with_itself(
    own, OTHER_OF, other_length, at, inside, here, PAIR, n, scale, teacher_scale,  # own: `side` of these samples
    G, H, g_stride, h_stride, COUNTS, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """G_ii of samples, from both sides' statistics and the float32 S_ii; 0 unless `here`."""
    own_max, own_log, own_a, own_b, own_u, own_tmax, own_tlog, own_c = own
    twin_max, twin_log, twin_a, twin_b, twin_u, twin_tmax, twin_tlog, twin_c = side(
        OTHER_OF, other_length, at, inside, G, H, g_stride, h_stride, COUNTS, n, smoothing, TARGETS, TEACHER, SMOOTHED
    )
    pair = tl.load(PAIR + at, mask=here, other=0.0)
    on = (_factor(own_a, own_max, own_log, pair, scale) - own_b) + (
        _factor(twin_a, twin_max, twin_log, pair, scale) - twin_b
    )
    if SMOOTHED:
        on -= own_u + twin_u
    if TEACHER:
        pair = tl.load(PAIR + n + at, mask=here, other=0.0)
        on -= _factor(own_c, own_tmax, own_tlog, pair, teacher_scale)
        on -= _factor(twin_c, twin_tmax, twin_tlog, pair, teacher_scale)
    return tl.where(here, on, 0.0)


@triton.jit
def head(kept, own_c, own_max, own_log, other_c, other_max, other_log, offset, step, scale):
    """own_c p + other_c p' of a tile (own, other) as kept."""
    if step == 0.0:
        of_own = _factor(own_c, own_max, own_log, offset, scale)
        of_other = _factor(other_c, other_max, other_log, offset, scale)
        g = kept.to(tl.float32) * (of_own[:, None] + of_other[None, :])
    else:
        S = kept_similarity(kept, offset, step)
        g = _factor(own_c[:, None], own_max[:, None], own_log[:, None], S, scale)
        g += _factor(other_c[None, :], other_max[None, :], other_log[None, :], S, scale)
    return g


@triton.jit
def _block(
    OTHER, OUT, KEPT, TILES, OWN_OF, OTHER_OF, OWN_LABELS, OTHER_LABELS, G, H, COUNTS, PAIR,
    scale, teacher_scale,
    own0, own_count, other0, other_count,  # of the panel: positions in the whole, how many there are
    own_length, other_length, block, part, n, d, other_stride, pitch, heads_at, tiles_at, across,
    g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows and BD columns of dx (own: rows of S, other: columns), or, transposed, of dt (own: columns)."""
    own = block * BM + tl.arange(0, BM)
    in_own = own < own_count
    k = part * BD + tl.arange(0, BD)
    own_side = side(
        OWN_OF, own_length, own0 + own, in_own, G, H, g_stride, h_stride, COUNTS, n, smoothing,
        TARGETS, TEACHER, SMOOTHED,
    )  # fmt: skip
    own_max, own_log, own_a, own_b, own_u, own_tmax, own_tlog, own_c = own_side
    own_label = own0 + own
    if TARGETS != PAIRS:
        own_label = tl.load(OWN_LABELS + own0 + own, mask=in_own, other=0)
    OTHER += other0 * long(other_stride)
    KEPT += block * BM if TRANSPOSED else block * long(BM) * pitch
    out = OUT + (own0 + own).to(tl.int64)[:, None] * d + k[None, :]
    out_mask = in_own[:, None] & (k < d)[None, :]
    acc = tl.zeros((BM, BD), tl.float32)
    if TARGETS != RECTANGLE:  # first, while registers are free
        here = (own0 + own >= other0) & (own0 + own < other0 + other_count) & in_own
        on = with_itself(
            own_side, OTHER_OF, other_length, own0 + own, in_own, here, PAIR, n, scale, teacher_scale,
            G, H, g_stride, h_stride, COUNTS, smoothing, TARGETS, TEACHER, SMOOTHED,
        )  # fmt: skip
        twin_at = (own0 + own - other0).to(tl.int64)[:, None] * other_stride + k[None, :]
        twin = tl.load(OTHER + twin_at, mask=here[:, None] & (k < d)[None, :], other=0.0)
        acc = on[:, None] * twin.to(tl.float32)
    if TRANSPOSED:
        if other0 > 0:
            acc += tl.load(out, mask=out_mask, other=0.0).to(tl.float32)
    for start in range(0, other_count, BK):
        other = start + tl.arange(0, BK)
        in_other = other < other_count
        if TRANSPOSED:
            kept_at = start * long(pitch) + (tl.arange(0, BK)[:, None] * pitch + tl.arange(0, BM)[None, :])
            inside = in_other[:, None] & in_own[None, :]
            tile_at = TILES + ((start // TILE_M) * long(across) + block * BM // TILE_N) * 2
        else:
            kept_at = tl.arange(0, BM)[:, None] * pitch + other[None, :]
            inside = in_own[:, None] & in_other[None, :]
            tile_at = TILES + ((block * BM // TILE_M) * long(across) + start // TILE_N) * 2
        other_max, other_log, other_a, other_b, other_u, other_tmax, other_tlog, other_c = side(
            OTHER_OF, other_length, other0 + other, in_other, G, H, g_stride, h_stride, COUNTS, n, smoothing,
            TARGETS, TEACHER, SMOOTHED,
        )  # fmt: skip
        kept = tl.load(KEPT + kept_at, mask=inside, other=0.0)
        if TRANSPOSED:
            kept = tl.trans(kept)
        g = head(
            kept, own_a, own_max, own_log, other_a, other_max, other_log, tl.load(tile_at), tl.load(tile_at + 1), scale
        )
        if TEACHER:
            kept = tl.load(KEPT + heads_at + kept_at, mask=inside, other=0.0)
            if TRANSPOSED:
                kept = tl.trans(kept)
            g -= head(
                kept, own_c, own_tmax, own_tlog, other_c, other_tmax, other_tlog,
                tl.load(tile_at + tiles_at), tl.load(tile_at + tiles_at + 1), teacher_scale,
            )  # fmt: skip
        if TARGETS != PAIRS:
            other_label = tl.load(OTHER_LABELS + other0 + other, mask=in_other, other=0)
            g -= tl.where(own_label[:, None] == other_label[None, :], own_b[:, None] + other_b[None, :], 0.0)
        if SMOOTHED:
            g -= own_u[:, None] + other_u[None, :]
        if TARGETS != RECTANGLE:
            g = tl.where((own0 + own)[:, None] == (other0 + other)[None, :], 0.0, g)
        at = start * long(other_stride) + (tl.arange(0, BK)[:, None] * other_stride + k[None, :])
        f = tl.load(OTHER + at, mask=in_other[:, None] & (k < d)[None, :], other=0.0)
        if f.dtype == tl.float16:  # its range cannot hold g; TF32 has its precision and float32's range
            f = f.to(tl.float32)
        acc = tl.dot(g.to(f.dtype), f, acc, input_precision=PRECISION)
    if TRANSPOSED:  # panels add up, unscaled until the last
        acc *= tl.where(other0 + other_count == n, scale, 1.0)
    else:
        acc *= scale
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=out_mask)


@triton.jit
def scale_gradient(G, H, BY_SCALE, DS, n, g_stride, h_stride, TEACHER: tl.constexpr, BS: tl.constexpr):
    at = tl.arange(0, BS)
    total = tl.zeros((BS,), tl.float32)
    for start in range(0, n, BS):
        i = start + at
        inside = i < n
        total += tl.load(G + i * long(g_stride), mask=inside, other=0.0) * tl.load(BY_SCALE + i, mask=inside, other=0.0)
        if TEACHER:
            by_scale = tl.load(BY_SCALE + n + i, mask=inside, other=0.0)
            total += tl.load(H + i * long(h_stride), mask=inside, other=0.0) * by_scale
    tl.store(DS, tl.sum(total, 0).to(DS.dtype.element_ty))


@triton.jit
def gradient_kernel(
    X, T, SCALE, TEACHER_SCALE,  # (n, d), (m, d), one element each
    X_LABELS, T_LABELS,  # (n,), (m,)
    KEPT, TILES,  # (heads, rows, pitch), (heads, row tiles, column tiles, 2), of this panel of rows
    ROW, COL, PAIR, COUNTS,  # (8, n), (8, m), (2, n), (n,): statistics, or in a rectangle coefficients
    G, H, BY_SCALE,  # (n,), (n,), (1 or 2, n): gradients of the losses, and their derivatives by the scale
    DX, DT, DS,  # (n, d), (m, d), one element
    row0, rows, n, m, d, x_stride, t_stride, pitch, g_stride, h_stride, smoothing,
    TARGETS: tl.constexpr, TEACHER: tl.constexpr, SMOOTHED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    scale = tl.load(SCALE).to(tl.float32)
    teacher_scale = scale
    if TEACHER:
        teacher_scale = tl.load(TEACHER_SCALE).to(tl.float32)
    across = tl.cdiv(m, TILE_N)
    heads_at, tiles_at = long(rows) * pitch, long(tl.cdiv(rows, TILE_M)) * across * 2
    parts = tl.cdiv(d, BD)
    of_x = tl.cdiv(rows, BM) * parts
    if pid < of_x:
        _block(
            T, DX, KEPT, TILES, ROW, COL, X_LABELS, T_LABELS, G, H, COUNTS, PAIR, scale, teacher_scale,
            row0, rows, 0, m, n, m, pid // parts, pid % parts, n, d, t_stride, pitch,
            heads_at, tiles_at, across, g_stride, h_stride, smoothing,
            TARGETS, TEACHER, SMOOTHED, False, PRECISION, TILE_M, TILE_N, BM, BD, BK,
        )  # fmt: skip
    elif pid < of_x + tl.cdiv(m, BM) * parts:
        block = (pid - of_x) // parts
        _block(
            X, DT, KEPT, TILES, COL, ROW, T_LABELS, X_LABELS, G, H, COUNTS, PAIR, scale, teacher_scale,
            0, m, row0, rows, m, n, block, (pid - of_x) % parts, n, d, x_stride, pitch,
            heads_at, tiles_at, across, g_stride, h_stride, smoothing,
            TARGETS, TEACHER, SMOOTHED, True, PRECISION, TILE_M, TILE_N, BM, BD, BK,
        )  # fmt: skip
    else:
        scale_gradient(G, H, BY_SCALE, DS, n, g_stride, h_stride, TEACHER, 1024)
