"""Gradients of features and class embeddings from the statistics and exponentials of z = s x w^T + b.

    class_gradient_kernel   dw = s G^T x, dx = s G w and db in one launch, one program a (BM, BD) block of either; ds

With e of a tile as kept (class_statistics.py, its maximum m), and of each row max, log_sum and coefficients

    G = e (a exp(m - max - log_sum) + [above] c exp(m - max - above_log_sum)) - u - v q,     G_y = its own

G_y, where p and its target cancel, comes from z_y in float32 and takes the place of the entry.

All rows of a class would keep few programs busy for long: they are split into SPLITS stretches, whose sums the caller
adds up. Without kept exponentials the rows come in panels, and each stretch adds to what the last panel left.
"""

import triton
import triton.language as tl

from robustft.ops.triton.class_statistics import ABOVE_ROW, ALL, MASS_ROW, NONE, SOFT, TOP, UNIFORM
from robustft.ops.triton.gradient import scale_gradient
from robustft.ops.triton.tile import LOG2E, long


@triton.jit
def _rows(
    ROW, LABELS, G, H, BY_GAP, i, inside, n, k, g_stride, h_stride, smoothing,
    HEAD: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """Of rows i: max, log_sum, a, label, G_y, above_log_sum (TOP: the class), c, u (SOFT: v). Outside the matrix
    log_sum is infinite, and the rest 0."""
    row, plane = ROW + i, long(n)
    highest = tl.load(row + 3 * HEAD * plane, mask=inside, other=0.0)
    log_sum = tl.load(row + (3 * HEAD + 1) * plane, mask=inside, other=float("inf"))
    z_label = tl.load(row + (3 * HEAD + 2) * plane, mask=inside, other=0.0)
    label = tl.load(LABELS + i, mask=inside, other=-1)
    if HEAD == 0:
        weight = tl.load(G + i * long(g_stride), mask=inside, other=0.0).to(tl.float32)
        a = weight
    else:
        weight = tl.load(H + i * long(h_stride), mask=inside, other=0.0).to(tl.float32)
        a = weight * tl.load(row + MASS_ROW * plane, mask=inside, other=0.0)
    of_label = a * (tl.exp2(((z_label - highest) - log_sum) * LOG2E) - 1.0)
    above_log, c, u = log_sum, weight, weight
    if TARGETS == UNIFORM:
        u = a * smoothing / k
        of_label += a * smoothing - u
    if ABOVE != NONE:
        above_log = tl.load(row + ABOVE_ROW * plane, mask=inside, other=0.0)
        slope = tl.load(BY_GAP + i, mask=inside, other=0.0)
        h = tl.load(H + i * long(h_stride), mask=inside, other=0.0).to(tl.float32)
        c = tl.where(slope == 0.0, 0.0, h * slope)  # exactly 0 where nothing is misranked, whatever h is
        of_label -= c
    return highest, log_sum, a, label, of_label, above_log, c, u


@triton.jit
def _entries(
    kept, maxima, highest, log_sum, a, label, of_label, above_log, c, u, q, classes,
    ABOVE: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """G of a tile as kept; of rows and classes, which broadcast to its shape."""
    e = kept.to(tl.float32)
    factor = a * tl.exp2(((maxima - highest) - log_sum) * LOG2E)
    if ABOVE == ALL:
        of_above = c * tl.exp2(((maxima - highest) - above_log) * LOG2E)
        g = tl.abs(e) * (factor + tl.where(e < 0.0, of_above, 0.0))
    else:
        g = e * factor
    if ABOVE == TOP:
        g += tl.where(classes == above_log.to(tl.int32, bitcast=True), c, 0.0)
    if TARGETS == UNIFORM:
        g -= u
    if TARGETS == SOFT:
        g -= u * q.to(tl.float32)
    else:
        g = tl.where(classes == label, of_label, g)
    return g


@triton.jit
def _product(g, f, acc, PRECISION: tl.constexpr):
    if f.dtype == tl.float16:  # its range cannot hold g; TF32 has its precision and float32's range
        f = f.to(tl.float32)
    return tl.dot(g.to(f.dtype), f, acc, input_precision=PRECISION)


@triton.jit
def _of_classes(
    X, ROW, LABELS, G, H, BY_GAP, MAXIMA, KEPT, Q, DW, DB, scale,
    block, part, split, row0, rows, n, k, d, x_stride, q_stride, maxima_stride, pitch, tiles, g_stride, h_stride,
    smoothing,
    HEAD: tl.constexpr, HEADS: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM classes and BD columns of dw, from a stretch of the rows."""
    classes = block * BM + tl.arange(0, BM)
    in_class = classes < k
    column = part * BD + tl.arange(0, BD)
    stretch = tl.cdiv(tl.cdiv(rows, SPLITS), BK) * BK
    MAXIMA += (HEAD * tiles + block * BM // TILE_N) * long(maxima_stride)
    acc, bias = tl.zeros((BM, BD), tl.float32), tl.zeros((BM,), tl.float32)
    for start in range(split * stretch, tl.minimum((split + 1) * stretch, rows), BK):
        r = start + tl.arange(0, BK)
        inside = r < rows
        both = inside[:, None] & in_class[None, :]
        highest, log_sum, a, label, of_label, above_log, c, u = _rows(
            ROW, LABELS, G, H, BY_GAP, row0 + r, inside, n, k, g_stride, h_stride, smoothing, HEAD, ABOVE, TARGETS
        )
        at = start * (HEADS * long(pitch)) + HEAD * pitch
        at += tl.arange(0, BK)[:, None] * (HEADS * pitch) + classes[None, :]
        kept = tl.trans(tl.load(KEPT + at, mask=both, other=0.0))
        q = kept
        if TARGETS == SOFT:
            at = (row0 + start) * long(q_stride) + tl.arange(0, BK)[:, None] * q_stride + classes[None, :]
            q = tl.trans(tl.load(Q + at, mask=both, other=0.0))
        maxima = tl.load(MAXIMA + r, mask=inside, other=0.0)
        g = _entries(
            kept, maxima[None, :], highest[None, :], log_sum[None, :], a[None, :], label[None, :], of_label[None, :],
            above_log[None, :], c[None, :], u[None, :], q, classes[:, None], ABOVE, TARGETS,
        )  # fmt: skip
        if DB is not None:
            bias += tl.sum(g, 1)
        at = (row0 + start) * long(x_stride) + tl.arange(0, BK)[:, None] * x_stride + column[None, :]
        x = tl.load(X + at, mask=inside[:, None] & (column < d)[None, :], other=0.0)
        acc = _product(g, x, acc, PRECISION)
    first = (split * HEADS + HEAD) * long(k)
    out = DW + (first + classes)[:, None] * d + column[None, :]
    out_mask = in_class[:, None] & (column < d)[None, :]
    acc *= scale
    if row0 > 0:
        acc += tl.load(out, mask=out_mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(DW.dtype.element_ty), mask=out_mask)
    if DB is not None:
        if part == 0:
            if row0 > 0:
                bias += tl.load(DB + first + classes, mask=in_class, other=0.0)
            tl.store(DB + first + classes, bias, mask=in_class)


@triton.jit
def _of_rows(
    acc, W, ROW, LABELS, G, H, BY_GAP, MAXIMA, KEPT, Q,
    block, column, row0, rows, n, k, d, w_stride, q_stride, maxima_stride, pitch, tiles, g_stride, h_stride, smoothing,
    HEAD: tl.constexpr, HEADS: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Adds to BM rows of dx what the classes of one head give."""
    r = block * BM + tl.arange(0, BM)
    inside = r < rows
    highest, log_sum, a, label, of_label, above_log, c, u = _rows(
        ROW, LABELS, G, H, BY_GAP, row0 + r, inside, n, k, g_stride, h_stride, smoothing, HEAD, ABOVE, TARGETS
    )
    KEPT += block * long(BM) * (HEADS * pitch) + HEAD * pitch
    MAXIMA += HEAD * tiles * long(maxima_stride) + r
    if TARGETS == SOFT:
        Q += (row0 + block * long(BM)) * q_stride
    for start in range(0, k, BK):
        classes = start + tl.arange(0, BK)
        in_class = classes < k
        both = inside[:, None] & in_class[None, :]
        at = tl.arange(0, BM)[:, None] * (HEADS * pitch) + classes[None, :]
        kept = tl.load(KEPT + at, mask=both, other=0.0)
        q = kept
        if TARGETS == SOFT:
            q = tl.load(Q + tl.arange(0, BM)[:, None] * q_stride + classes[None, :], mask=both, other=0.0)
        maxima = tl.load(MAXIMA + (start // TILE_N) * long(maxima_stride), mask=inside, other=0.0)
        g = _entries(
            kept, maxima[:, None], highest[:, None], log_sum[:, None], a[:, None], label[:, None], of_label[:, None],
            above_log[:, None], c[:, None], u[:, None], q, classes[None, :], ABOVE, TARGETS,
        )  # fmt: skip
        at = (HEAD * k + start) * long(w_stride) + tl.arange(0, BK)[:, None] * w_stride + column[None, :]
        w = tl.load(W + at, mask=in_class[:, None] & (column < d)[None, :], other=0.0)
        acc = _product(g, w, acc, PRECISION)
    return acc


@triton.jit
def class_gradient_kernel(
    X, W, SCALE, LABELS, Q,  # (n, d), (HEADS k, d), one element, (n,), (n, k) soft targets
    ROW, MAXIMA, KEPT,  # (8, n), (HEADS tiles, .), (rows, HEADS pitch): as class_statistics_kernel left them
    G, H, BY_GAP, BY_SCALE,  # (n,), (n,): gradients of the losses; (n,), (2, n): class_losses.py
    DX, DW, DB, DS,  # (n, d), (SPLITS, HEADS k, d), (SPLITS, HEADS k) or None, one element
    row0, rows, n, k, d, x_stride, w_stride, q_stride, maxima_stride, pitch, g_stride, h_stride, smoothing,
    HEADS: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    scale = tl.load(SCALE).to(tl.float32)
    tiles, parts = tl.cdiv(k, TILE_N), tl.cdiv(d, BD)
    blocks = tl.cdiv(k, BM) * parts
    of_w = blocks * SPLITS
    of_x = tl.cdiv(rows, BM) * parts
    # What of the targets and of the classes above the label concerns the first of two heads: nothing.
    FIRST: tl.constexpr = TARGETS if HEADS == 1 else NONE
    if pid < HEADS * of_w:
        block, part, split = pid % blocks // parts, pid % parts, pid % of_w // blocks
        if pid < of_w:
            _of_classes(
                X, ROW, LABELS, G, H, BY_GAP, MAXIMA, KEPT, Q, DW, DB, scale, block, part, split,
                row0, rows, n, k, d, x_stride, q_stride, maxima_stride, pitch, tiles, g_stride, h_stride, smoothing,
                0, HEADS, ABOVE, FIRST, SPLITS, PRECISION, TILE_N, BM, BD, BK,
            )  # fmt: skip
        elif HEADS == 2:
            _of_classes(
                X, ROW, LABELS, G, H, BY_GAP, MAXIMA, KEPT, Q, DW, DB, scale, block, part, split,
                row0, rows, n, k, d, x_stride, q_stride, maxima_stride, pitch, tiles, g_stride, h_stride, smoothing,
                1, HEADS, ABOVE, TARGETS, SPLITS, PRECISION, TILE_N, BM, BD, BK,
            )  # fmt: skip
    elif pid < HEADS * of_w + of_x:
        block, part = (pid - HEADS * of_w) // parts, (pid - HEADS * of_w) % parts
        column = part * BD + tl.arange(0, BD)
        acc = _of_rows(
            tl.zeros((BM, BD), tl.float32), W, ROW, LABELS, G, H, BY_GAP, MAXIMA, KEPT, Q,
            block, column, row0, rows, n, k, d, w_stride, q_stride, maxima_stride, pitch, tiles, g_stride, h_stride,
            smoothing, 0, HEADS, ABOVE, FIRST, PRECISION, TILE_N, BM, BK,
        )  # fmt: skip
        if HEADS == 2:
            acc = _of_rows(
                acc, W, ROW, LABELS, G, H, BY_GAP, MAXIMA, KEPT, Q,
                block, column, row0, rows, n, k, d, w_stride, q_stride, maxima_stride, pitch, tiles, g_stride,
                h_stride, smoothing, 1, HEADS, ABOVE, TARGETS, PRECISION, TILE_N, BM, BK,
            )  # fmt: skip
        r = block * BM + tl.arange(0, BM)
        out = DX + (row0 + r).to(tl.int64)[:, None] * d + column[None, :]
        tl.store(out, (acc * scale).to(DX.dtype.element_ty), mask=(r < rows)[:, None] & (column < d)[None, :])
    else:
        scale_gradient(G, H, BY_SCALE, DS, n, g_stride, h_stride, True, 1024)
