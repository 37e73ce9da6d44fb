"""The losses on class logits, from the statistics of tiles (class_statistics.py).

One program for BS samples combines their tiles' statistics in fixed order. Terms and derivatives by the scale are those
of robustft/ops/classification.py; ROW is what the backward needs of them.
"""

import triton
import triton.language as tl

from robustft.ops.triton.class_statistics import ABOVE_ROW, ALL, MASS_ROW, NONE, TOP, UNIFORM
from robustft.ops.triton.tile import LN2, LOG2E, LOWEST, long


@triton.jit
def _fold(
    MAXIMA, PART, head, tiles, r, in_row, rows, maxima_stride,
    HEADS: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The tiles of one head, in their order: max, sum, weighted, the two of `above` (TOP: S there, the class) and the
    three of the targets."""
    none = tl.zeros((BS,), tl.float32)
    highest, sums, weighted, above, above_weighted = none + LOWEST, none, none, none, none
    mass, gap, target = none, none, none
    top = tl.zeros((BS,), tl.int32)
    plane = HEADS * tiles * long(rows)
    kind: tl.constexpr = 2 if ABOVE == NONE else 4
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        valid = (t < tiles)[:, None] & in_row[None, :]
        t = (head * tiles + t).to(tl.int64)[:, None]
        part = PART + t * rows + r[None, :]
        high = tl.load(MAXIMA + t * maxima_stride + r[None, :], mask=valid, other=LOWEST)
        new = tl.maximum(highest, tl.max(high, 0))
        keep_old = tl.exp2((highest - new) * LOG2E)
        keep = tl.where(valid, tl.exp2((high - new[None, :]) * LOG2E), 0.0)
        sums = sums * keep_old + tl.sum(tl.load(part, mask=valid, other=0.0) * keep, 0)
        weighted = weighted * keep_old + tl.sum(tl.load(part + plane, mask=valid, other=0.0) * keep, 0)
        if ABOVE == ALL:
            above = above * keep_old + tl.sum(tl.load(part + 2 * plane, mask=valid, other=0.0) * keep, 0)
            tile = tl.load(part + 3 * plane, mask=valid, other=0.0)
            above_weighted = above_weighted * keep_old + tl.sum(tile * keep, 0)
        if ABOVE == TOP:
            last: tl.constexpr = 2147483647
            at = tl.load(part + 3 * plane, mask=valid, other=0.0).to(tl.int32, bitcast=True)
            at = tl.where(valid & (high == new[None, :]), at, last)
            first = tl.min(at, 0)
            S = tl.sum(tl.where(at == first[None, :], tl.load(part + 2 * plane, mask=valid, other=0.0), 0.0), 0)
            better = (new > highest) & (first < last)
            top, above = tl.where(better, first, top), tl.where(better, S, above)
        if TARGETS != NONE:
            q = tl.load(part + kind * plane, mask=valid, other=0.0)
            below = tl.load(part + (kind + 1) * plane, mask=valid, other=0.0)
            below += q * tl.where(valid, new[None, :] - high, 0.0)
            gap += mass * tl.where(mass == 0.0, 0.0, new - highest) + tl.sum(below, 0)
            mass += tl.sum(q, 0)
            target += tl.sum(tl.load(part + (kind + 2) * plane, mask=valid, other=0.0), 0)
        highest = new
    # A logarithm's last bit must not make a loss negative. NaN stays; tl.maximum would swallow it.
    log_sum = tl.log2(sums) * LN2
    log_sum = tl.where(log_sum < 0.0, 0.0, log_sum)
    if ABOVE == TOP:
        above_weighted = top.to(tl.float32, bitcast=True)
    return highest, log_sum, weighted / sums, above, above_weighted, mass, gap, target


@triton.jit
def _of_label(LABEL, LABELS, head, i, in_row, n, k):
    """z_y and S_y; NaN of labels that are no class."""
    label = tl.load(LABELS + i, mask=in_row, other=0)
    inside, at = in_row & (label >= 0) & (label < k), LABEL + head * 2 * long(n) + i
    return tl.load(at, mask=inside, other=float("nan")), tl.load(at + n, mask=inside, other=float("nan"))


@triton.jit
def penalty_of_gap(gap, VARIANT: tl.constexpr):
    """f(L) and f'(L); VARIANT is an index in robustft.ops.arguments.VARIANTS."""
    ratio = tl.exp2(-gap * LOG2E)  # p_y over the sum of p above it, at most 1: gaps are not negative
    if VARIANT == 0:
        penalty, slope = gap, tl.full(gap.shape, 1.0, tl.float32)
    elif VARIANT == 1:
        penalty, slope = 1.0 - ratio, ratio
    elif VARIANT == 2:
        penalty, slope = gap + tl.log2(1.0 + ratio) * LN2, 1.0 / (1.0 + ratio)
    else:
        penalty, slope = ratio, -ratio
    return penalty, slope


@triton.jit
def classification_combine_kernel(
    MAXIMA, PART, LABEL, LABELS,  # what class_statistics_kernel wrote of these rows, (n,)
    ROW,  # (8, n): what the backward needs
    CROSS_ENTROPY, MISALIGNMENT, BY_GAP, BY_SCALE,  # (n,), (n,), (n,): the penalty's slope, (2, n)
    row0, rows, n, k, tiles, maxima_stride, smoothing,
    VARIANT: tl.constexpr, ABOVE: tl.constexpr, TARGETS: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BS + tl.arange(0, BS)
    i, in_row = row0 + r, r < rows
    highest, log_sum, mean, above, above_weighted, mass, gap, target = _fold(
        MAXIMA, PART, 0, tiles, r, in_row, rows, maxima_stride, 1, ABOVE, TARGETS, BS, BT
    )
    label, S_label = _of_label(LABEL, LABELS, 0, i, in_row, n, k)
    miss = highest - label
    # A NaN is in log_sum, whatever comparisons and maxima made of it, and the penalty must not hide it.
    miss = tl.where(log_sum == log_sum, miss, log_sum)
    if ABOVE == TOP:
        wrong = ~((highest <= label) & (miss == miss))
        penalty, by_penalty, of_above = miss, above - S_label, above_weighted
    else:
        wrong = ~((above == 0.0) & (miss == miss))
        of_above = tl.where(wrong, tl.log2(tl.where(wrong, above, 1.0)) * LN2, 0.0)
        penalty, by_penalty = of_above + miss, above_weighted / tl.where(wrong, above, 1.0) - S_label
    penalty, slope = penalty_of_gap(penalty, VARIANT)
    slope = tl.where(wrong, slope, 0.0)
    tl.store(MISALIGNMENT + i, tl.where(wrong, penalty, 0.0), mask=in_row)
    tl.store(BY_GAP + i, slope, mask=in_row)
    tl.store(BY_SCALE + n + i, tl.where(wrong, slope * by_penalty, 0.0), mask=in_row)
    tl.store(ROW + i, highest, mask=in_row)
    tl.store(ROW + long(n) + i, log_sum, mask=in_row)
    tl.store(ROW + 2 * long(n) + i, label, mask=in_row)
    tl.store(ROW + ABOVE_ROW * long(n) + i, of_above, mask=in_row)
    if TARGETS == UNIFORM:
        miss += smoothing * (gap / k - miss)
        S_label += smoothing * (target / k - S_label)
    tl.store(CROSS_ENTROPY + i, log_sum + miss, mask=in_row)
    tl.store(BY_SCALE + i, mean - S_label, mask=in_row)


@triton.jit
def dual_combine_kernel(
    MAXIMA, PART, LABEL, LABELS,  # what class_statistics_kernel wrote of these rows, (n,)
    CONFIDENCE,  # (n,) or, with soft targets, None
    ROW,  # (8, n): what the backward needs
    EMPIRICAL, WORST_CASE, BY_SCALE,  # (n,), (n,), (2, n)
    row0, rows, n, k, tiles, maxima_stride, confidence_stride,
    TARGETS: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BS + tl.arange(0, BS)
    i, in_row = row0 + r, r < rows
    label, S_label = _of_label(LABEL, LABELS, 0, i, in_row, n, k)
    highest, log_sum, mean, above, above_weighted, mass, gap, target = _fold(
        MAXIMA, PART, 0, tiles, r, in_row, rows, maxima_stride, 2, NONE, NONE, BS, BT
    )
    tl.store(EMPIRICAL + i, log_sum + (highest - label), mask=in_row)
    tl.store(BY_SCALE + i, mean - S_label, mask=in_row)
    tl.store(ROW + i, highest, mask=in_row)
    tl.store(ROW + long(n) + i, log_sum, mask=in_row)
    tl.store(ROW + 2 * long(n) + i, label, mask=in_row)
    label, S_label = _of_label(LABEL, LABELS, 1, i, in_row, n, k)
    highest, log_sum, mean, above, above_weighted, mass, gap, target = _fold(
        MAXIMA, PART, 1, tiles, r, in_row, rows, maxima_stride, 2, NONE, TARGETS, BS, BT
    )
    if TARGETS == NONE:
        mass = tl.load(CONFIDENCE + i * long(confidence_stride), mask=in_row, other=0.0).to(tl.float32)
        gap, target = mass * (highest - label), mass * S_label
    tl.store(WORST_CASE + i, mass * log_sum + gap, mask=in_row)
    tl.store(BY_SCALE + n + i, mass * mean - target, mask=in_row)
    tl.store(ROW + 3 * long(n) + i, highest, mask=in_row)
    tl.store(ROW + 4 * long(n) + i, log_sum, mask=in_row)
    tl.store(ROW + 5 * long(n) + i, label, mask=in_row)
    tl.store(ROW + MASS_ROW * long(n) + i, mass, mask=in_row)
