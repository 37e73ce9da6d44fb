"""The misalignment penalty of logits z (n, k) that exist already, and its gradient, on a GPU: one launch each.

With offset the largest z of a row (0 if that is infinite) and `above` the classes that rank strictly above the label

    log_sum = log of the sum over `above` of exp(z - offset), -inf where it is empty (top-1: 0)
    L = log_sum + (offset - z_y),   penalty = f(L),   gradient = g f'(L) (softmax over `above` - 1_y)

as csrc/cpu/misalignment.cpp has them; `kept` (3, n) is offset, log_sum and f'(L). A program owns BR rows and reads them
BC classes at a time, once forward and once backward (top-1 twice, to find the first of the highest). A NaN is above the
label, so that a row with one has a penalty of NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft.ops.arguments import VARIANTS
from robustft.ops.triton import autotune, configs
from robustft.ops.triton.class_losses import penalty_of_gap
from robustft.ops.triton.launch import architecture, launch
from robustft.ops.triton.tile import LN2, LOG2E, long


@triton.jit
def _label(Z, LABELS, i, in_row, k, row_stride, class_stride):
    """Where the rows begin, their labels, and z_y: NaN of labels that are no class."""
    rows = Z + i.to(tl.int64) * row_stride
    label = tl.load(LABELS + i, mask=in_row, other=0)
    inside = in_row & (label >= 0) & (label < k)
    return rows, label, tl.load(rows + label * class_stride, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _chunk(rows, j, in_row, k, class_stride):
    mask = in_row[:, None] & (j < k)[None, :]
    at = rows[:, None] + j.to(tl.int64)[None, :] * class_stride
    return tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def misalignment_kernel(
    Z, LABELS, PENALTY, ERRORS, KEPT,  # (n, k), (n,), (n,), one int64 of 0, (3, n)
    n, k, row_stride, class_stride,
    VARIANT: tl.constexpr, TOP1: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    in_row = i < n
    rows, _, label = _label(Z, LABELS, i, in_row, k, row_stride, class_stride)
    highest = tl.full((BR,), float("-inf"), tl.float32)
    offset, total = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    for start in range(0, k, BC):
        z = _chunk(rows, start + tl.arange(0, BC), in_row, k, class_stride)
        highest = tl.maximum(highest, tl.max(z, 1))
        new = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)  # inf - inf would be NaN
        above = ~(z <= label[:, None])
        e = tl.where(above, tl.exp2((z - new[:, None]) * LOG2E), 0.0)
        total = total * tl.where(total == 0.0, 0.0, tl.exp2((offset - new) * LOG2E)) + tl.sum(e, 1)
        offset = new
    wrong = in_row & ~(total == 0.0)
    log_sum = tl.where(wrong, tl.log2(tl.where(wrong, total, 1.0)) * LN2, float("-inf"))
    if TOP1:
        offset = tl.where(total == total, highest, total)  # a maximum ignores NaN
        log_sum = tl.where(wrong, tl.where(total == total, 0.0, total), float("-inf"))
    penalty, slope = penalty_of_gap(tl.where(wrong, log_sum + (offset - label), 0.0), VARIANT)
    tl.store(PENALTY + i, tl.where(wrong, penalty, 0.0), mask=in_row)
    out, plane = KEPT + i, long(n)
    tl.store(out, offset, mask=in_row)
    tl.store(out + plane, log_sum, mask=in_row)
    tl.store(out + 2 * plane, tl.where(wrong, slope, 0.0), mask=in_row)
    tl.atomic_add(ERRORS, tl.sum(wrong.to(tl.int64), 0))


@triton.jit
def misalignment_gradient_kernel(
    Z, G, LABELS, KEPT, DZ,  # (n, k), (n,), (n,), (3, n), (n, k) contiguous
    n, k, row_stride, class_stride, g_stride,
    TOP1: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    in_row = i < n
    rows, label_class, label = _label(Z, LABELS, i, in_row, k, row_stride, class_stride)
    kept, plane = KEPT + i, long(n)
    offset = tl.load(kept, mask=in_row, other=0.0)
    log_sum = tl.load(kept + plane, mask=in_row, other=0.0)
    slope = tl.load(kept + 2 * plane, mask=in_row, other=0.0)
    g = tl.load(G + i * long(g_stride), mask=in_row, other=0.0).to(tl.float32)
    c = tl.where(slope == 0.0, 0.0, g * slope)  # exactly 0 where nothing is misranked, whatever g is
    first = tl.zeros((BR,), tl.int32) + k
    if TOP1:
        for start in range(0, k, BC):
            j = start + tl.arange(0, BC)
            z = _chunk(rows, j, in_row, k, class_stride)
            first = tl.minimum(first, tl.min(tl.where(z == offset[:, None], j[None, :], k), 1))
    for start in range(0, k, BC):
        j = start + tl.arange(0, BC)
        if TOP1:
            dz = tl.where(j[None, :] == first[:, None], c[:, None], 0.0)
        else:
            z = _chunk(rows, j, in_row, k, class_stride)
            softmax = tl.exp2(((z - offset[:, None]) - log_sum[:, None]) * LOG2E)
            dz = tl.where(~(z <= label[:, None]) & (c != 0.0)[:, None], c[:, None] * softmax, 0.0)
        dz = tl.where(label_class[:, None] == j[None, :], -c[:, None], dz)
        at = DZ + i.to(tl.int64)[:, None] * k + j[None, :]
        tl.store(at, dz.to(DZ.dtype.element_ty), mask=in_row[:, None] & (j < k)[None, :])


def _launch(kernel, logits: Tensor, arguments: dict[str, object]) -> None:
    n, k = logits.shape
    rows, classes, warps = configs.penalty(k, architecture(logits.device))
    strides = {"row_stride": logits.stride(0), "class_stride": logits.stride(1)}
    launch(kernel, -(-n // rows), {**arguments, "n": n, "k": k, **strides, "BR": rows, "BC": classes}, warps=warps)


def _penalty(logits, labels, variant, top1) -> tuple[Tensor, Tensor, Tensor]:
    n = len(logits)
    penalty, kept = (logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (3, n)))
    errors = labels.new_zeros(())
    results = {"PENALTY": penalty, "ERRORS": errors, "KEPT": kept}
    switches = {"VARIANT": VARIANTS.index(variant), "TOP1": top1}
    _launch(misalignment_kernel, logits, {"Z": logits, "LABELS": labels.contiguous(), **results, **switches})
    return penalty, errors, kept


def misalignment_penalty(logits, labels, variant, top1) -> tuple[Tensor, Tensor, Tensor]:
    if autotune.WANTED:
        g = logits.new_ones(len(logits), dtype=torch.float32)

        def both() -> Tensor:
            kept = _penalty(logits, labels, variant, top1)[2]
            return misalignment_penalty_backward(g, logits, labels, top1, kept)

        autotune.tune(configs.penalties(architecture(logits.device)), autotune.penalties(), both)
    return _penalty(logits, labels, variant, top1)


def misalignment_penalty_backward(grad, logits, labels, top1, kept) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tensors = {"Z": logits, "G": grad, "LABELS": labels.contiguous(), "KEPT": kept, "DZ": gradient}
    _launch(misalignment_gradient_kernel, logits, {**tensors, "g_stride": grad.stride(0), "TOP1": top1})
    return gradient
