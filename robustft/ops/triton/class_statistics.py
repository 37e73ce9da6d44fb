"""Softmax statistics of class logits z = s x w^T + b, by row and tile.

    label_kernel             z_y of every row: entry (i, i) of a tile of some rows and their own labels' classes, of
                             the sides that the classes' tiles have. On a GPU an entry does not depend on where it
                             lies in a tile, so that a class with the label's embedding and bias ties with the label
    class_statistics_kernel  one program a tile: z in float32, its statistics by row (one writer each), and, if asked
                             to, the tile's exponentials for the backward

Of each row and tile, with m the largest z, e = exp(z - m) and `above` the classes that rank strictly above the label:

    MAXIMA  m
    PART    sum e, sum e S                       ABOVE ALL: sum of e and of e S over `above`
                                                 ABOVE TOP: S at the first z that is m, and its class (an int32's bits)
                                                 TARGETS: sum q, sum q (m - z), sum q S
    LABEL   z_y, S_y, from the tile that has the label's class

What is kept is e, 16 or 32 bits an entry: a softmax over rows needs one maximum only, so that no tile is too wide.
Its sign bit, which no exponential needs, says whether the class is above the label: e itself could not, rounded.
w (heads k, d) and b hold one head's classes below the other's. class_losses.py makes losses of it.
"""

import triton
import triton.language as tl

from robustft.ops.triton.tile import LOG2E, LOWEST, long, place, product

# Which classes the penalty is about.
NONE = tl.constexpr(0)
ALL = tl.constexpr(1)  # all that rank above the label
TOP = tl.constexpr(2)  # the first of the highest, if it ranks above the label

# What else the classes are weighed with: soft targets, the last head's.
UNIFORM = tl.constexpr(1)
SOFT = tl.constexpr(2)

# Rows of what is kept of a sample: max, log_sum and z_y of each head; then these, and below them the tiles' maxima.
ABOVE_ROW = tl.constexpr(6)  # log_sum of `above`, 0 where it is empty; TOP: the class, as an int32's bits
MASS_ROW = tl.constexpr(7)  # what the last head's target sums to
KEPT_ROWS = tl.constexpr(8)


@triton.jit
def class_logits(S, scale, BIAS, j):
    """s S + b of the classes j (BN,): one rounding, wherever it is computed."""
    if BIAS is None:
        bias = tl.zeros(j.shape, tl.float32)
    else:
        bias = tl.load(BIAS + j).to(tl.float32)
    return tl.fma(S, scale, bias[None, :])


@triton.jit
def label_kernel(
    X, W, SCALE, BIAS,  # (n, d), (k, d), one element, (k,) or None
    LABELS, THRESHOLD,  # (n,), (n,): z_y
    n, k, d, x_stride, w_stride,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = BM if BM < BN else BN
    first = tl.program_id(0) * side
    row, col = tl.arange(0, BM), tl.arange(0, BN)
    label = tl.load(LABELS + tl.minimum(first + col % side, n - 1))
    label = tl.minimum(tl.maximum(label, 0), k - 1).to(tl.int32)
    i = tl.minimum(first + row % side, n - 1)
    scale = tl.load(SCALE).to(tl.float32)
    z = class_logits(product(X, W, i, label, d, x_stride, w_stride, PRECISION, BM, BN, BK), scale, BIAS, label)
    own = tl.sum(tl.where(row[:, None] == col[None, :], z, 0.0), 1)
    tl.store(THRESHOLD + first + row, own, mask=(row < side) & (first + row < n))


@triton.jit
def class_statistics_kernel(
    X, W, SCALE, BIAS,  # (n, d), (HEADS k, d), one element, (HEADS k,) or None
    LABELS, THRESHOLD, Q,  # (n,), (n,) z_y, (n, k) soft targets
    MAXIMA, PART, LABEL,  # (HEADS tiles, .), (kinds, HEADS tiles, rows), (HEADS, 2, n): z_y, S_y
    KEPT,  # (rows, HEADS pitch)
    row0, rows, n, k, d, x_stride, w_stride, q_stride, maxima_stride, pitch,
    HEADS: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Without PART: only the maxima and exponentials of these rows again, for a backward that nothing was kept for."""
    tiles = tl.cdiv(k, BN)
    p, t = place(rows, HEADS * tiles * BN, BM, BN, GROUP)
    head, first = t // tiles, t % tiles * BN
    r, j = p * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    in_row, in_col = r < rows, j < k
    # Rows and classes beyond the end are the last one again: nothing outside the matrices is read.
    i = tl.minimum(row0 + r, n - 1)
    column = head * k + tl.minimum(j, k - 1)
    scale = tl.load(SCALE).to(tl.float32)
    S = product(X, W, i, column, d, x_stride, w_stride, PRECISION, BM, BN, BK)
    z = tl.where(in_col[None, :], class_logits(S, scale, BIAS, column), LOWEST)
    highest = tl.max(z, 1)
    tl.store(MAXIMA + t * long(maxima_stride) + r, highest, mask=in_row)
    e = tl.exp2((z - highest[:, None]) * LOG2E)
    label = tl.load(LABELS + i)
    own = label[:, None] == j[None, :]
    if ABOVE == ALL:
        # Not at most, rather than more: a NaN is above.
        above = ~(z <= tl.load(THRESHOLD + i)[:, None]) & ~own & in_col[None, :]
    if PART is not None:
        part = PART + t * long(rows) + r
        plane = HEADS * tiles * long(rows)
        tl.store(part, tl.sum(e, 1), mask=in_row)
        tl.store(part + plane, tl.sum(e * S, 1), mask=in_row)
        if ABOVE == ALL:
            of_above = tl.where(above, e, 0.0)
            tl.store(part + 2 * plane, tl.sum(of_above, 1), mask=in_row)
            tl.store(part + 3 * plane, tl.sum(of_above * S, 1), mask=in_row)
        if ABOVE == TOP:
            top = tl.min(tl.where(z == highest[:, None], j[None, :], k - 1), 1)
            tl.store(part + 2 * plane, tl.sum(tl.where(top[:, None] == j[None, :], S, 0.0), 1), mask=in_row)
            tl.store(part + 3 * plane, top.to(tl.int32).to(tl.float32, bitcast=True), mask=in_row)
        if TARGETS != NONE:
            if head == HEADS - 1:
                inside = in_row[:, None] & in_col[None, :]
                if TARGETS == SOFT:
                    at = Q + i.to(tl.int64)[:, None] * q_stride + j[None, :]
                    q = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                else:
                    q = tl.where(inside, 1.0, 0.0)
                kind: tl.constexpr = 2 if ABOVE == NONE else 4
                tl.store(part + kind * plane, tl.sum(q, 1), mask=in_row)
                gap = tl.where(in_col[None, :], highest[:, None] - z, 0.0)
                tl.store(part + (kind + 1) * plane, tl.sum(q * gap, 1), mask=in_row)
                tl.store(part + (kind + 2) * plane, tl.sum(q * S, 1), mask=in_row)
        here = in_row & (label >= first) & (label < first + BN)
        at = LABEL + head * 2 * long(n) + i
        tl.store(at, tl.sum(tl.where(own, z, 0.0), 1), mask=here)
        tl.store(at + n, tl.sum(tl.where(own, S, 0.0), 1), mask=here)
    if KEEP:
        if ABOVE == ALL:
            e = tl.where(above, -e, e)
        corner = KEPT + p * long(BM) * (HEADS * pitch) + head * pitch + first
        at = tl.arange(0, BM)[:, None] * (HEADS * pitch) + tl.arange(0, BN)[None, :]
        tl.store(corner + at, e.to(KEPT.dtype.element_ty), mask=in_row[:, None] & in_col[None, :])
