"""Contrastive losses of a batch spread over a process group: the exact global loss, one-sided.

Each rank multiplies its own n images with all M = W n texts. Row statistics are then complete; column statistics are
partial and a few M-vectors of them are exchanged. In the backward each rank has its images' gradient complete and a
part of every text's, which a reduce-scatter adds up. Images are never gathered, and each rank does 1/W of the work,
half of what gathering both sides costs. The sigmoid losses have no statistics of columns, and exchange none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from robustft.ops import layouts, ranks, reference, sigmoid, similarity
from robustft.ops.contrastive import (
    coefficients,
    contrastive_terms,
    distillation_terms,
    kept_softmaxes,
    label_counts,
)
from robustft.ops.dispatch import body_of
from robustft.ops.registry import accumulation_dtype
from robustft.ops.similarity import Matrices, Softmaxes, Statistics

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""By its name of torch 2.14, where that of earlier ones is deprecated."""


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n, ...) of every rank, joined in rank order: (W n, ...)."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def _description(
    function: str,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    options: dict[str, object],
) -> dict[str, object]:
    """What must be the same on every rank for the collectives to fit, and for the losses to be of one batch."""
    return {
        "function": function,
        "image_features": f"{tuple(x.shape)} {x.dtype} on {x.device.type}",
        "logit_scale": float(s),
        "labels": None if labels is None else labels.dtype,
        "weight": None if weight is None else weight.dtype,
        **options,
        "gradient": torch.is_grad_enabled() and (x.requires_grad or t.requires_grad or s.requires_grad),
    }


def _merge_columns(parts: Tensor, s: Tensor, st: Tensor | None) -> Statistics:
    """Of the columns over all rows, from (W, 5 or 8, M), each over the rows of one rank."""

    def softmax(highs: Tensor, log_sums: Tensor, gaps: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        highest = highs.amax(0)
        log_sums = log_sums + scale * (highs - highest)
        log_sum = log_sums.logsumexp(0)
        return highest, log_sum, ((log_sums - log_sum).exp() * gaps).sum(0)

    of = Statistics(*parts.unbind(1))
    shifted = of.max - of.max.amax(0)  # gaps are relative to the maximum, the student's
    merged = *softmax(of.max, of.log_sum, of.gap + shifted, s), of.target.sum(0), of.total.sum(0)
    if st is None:
        return Statistics(*merged)
    assert of.teacher_max is not None and of.teacher_log_sum is not None and of.teacher_gap is not None
    return Statistics(*merged, *softmax(of.teacher_max, of.teacher_log_sum, of.teacher_gap + shifted, st))


class _ShardedTerms(torch.autograd.Function):
    """Local per-sample losses (n,) of the global matrix: contrastive and, with a teacher, distillation."""

    @staticmethod
    def forward(ctx, x, t, scale, labels, label_smoothing, xt, tt, st, group, memory, function, call):
        n, rank, world = len(x), dist.get_rank(group), dist.get_world_size(group)
        body = body_of("similarity_statistics", x)
        keep = layouts.fits(memory, body, n, world * n, x, 1 if xt is None else 2)
        mine = slice(rank * n, (rank + 1) * n)
        texts, teacher_texts = _gather(t, group), None if tt is None else _gather(tt, group)
        labels = None if labels is None else _gather(labels, group)
        index, counts = label_counts(labels, world * n, x.device, accumulation_dtype(x.dtype))
        matrices, targets = Matrices(x, texts, scale, xt, teacher_texts, st), (index[mine], index)
        if body == "reference":
            row, col = reference.similarity_statistics(*matrices[:3], *targets, *matrices[3:])
            kept: list[Tensor] = []
        else:
            row, col, *kept = similarity.statistics(matrices, *targets, label_smoothing > 0, keep)
        s = scale.to(row.dtype)
        of_rows = Statistics(*row)
        of_cols = _merge_columns(_gather(col[None], group), s, None if st is None else st.to(row.dtype))
        of_mine = Statistics._make(None if field is None else field[mine] for field in of_cols)
        terms = [contrastive_terms(of_rows, of_mine, s, counts[mine], world * n, label_smoothing)]
        if xt is not None:
            terms.append(distillation_terms(of_rows, of_mine, s))
        vectors = counts, kept_softmaxes(of_rows), kept_softmaxes(of_cols)
        ctx.save_for_backward(*matrices, *targets, *vectors, *(d for _, d in terms), *kept)
        ctx.label_smoothing, ctx.group, ctx.body, ctx.mine = label_smoothing, group, body, mine
        ctx.description = {"function": f"backward of {function}", "the loss to differentiate": call}
        losses = tuple(loss for loss, _ in terms)
        return losses if xt is not None else losses[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        ranks.agree(ctx.description, ctx.group)
        saved = ctx.saved_tensors
        matrices, (mine, others), (counts, row, col) = Matrices(*saved[:6]), saved[6:8], saved[8:11]
        by_scale, kept = saved[11 : 11 + len(grads)], saved[11 + len(grads) :]
        scale, smoothing, entries = matrices.scale, ctx.label_smoothing, len(counts)
        gathered = [_gather(g, ctx.group) for g in grads]
        local = [g[ctx.mine] for g in gathered]
        of_rows = coefficients(Softmaxes(*row), local[0], counts[ctx.mine], entries, smoothing, *local[1:])
        of_cols = coefficients(Softmaxes(*col), gathered[0], counts, entries, smoothing, *gathered[1:])
        if ctx.body == "reference":
            dx, dt = reference.similarity_gradient(*matrices[:3], mine, others, *matrices[3:], of_rows, of_cols)
        else:
            dx, dt = similarity.gradient(matrices, mine, others, of_rows, of_cols, kept, smoothing > 0)
        dt_local = dt.new_empty(len(matrices.x), dt.shape[1], dtype=row.dtype)
        _reduce_scatter(dt_local, dt.to(row.dtype), group=ctx.group)
        ds = sum((g * d).sum() for g, d in zip(grads, by_scale, strict=True))
        return dx, dt_local.to(dt.dtype), ds.to(scale.dtype).reshape(scale.shape), *[None] * 9


class _ShardedSigmoid(torch.autograd.Function):
    """Local losses (n,) of the global matrix, contrastive and, with a teacher, distillation; or, of `total`, the local
    contrastive ones times their weights, added up, whose gradients the forward computes (sigmoid.py)."""

    @staticmethod
    def forward(ctx, x, t, scale, bias, labels, weight, xt, tt, st, bt, total, keep, group, function, call):
        n, rank, world = len(x), dist.get_rank(group), dist.get_world_size(group)
        texts, teacher_texts = _gather(t, group), None if tt is None else _gather(tt, group)
        others = sigmoid.indices(None if labels is None else _gather(labels, group), world * n, x.device)
        of = x, texts, scale, bias, others[rank * n : (rank + 1) * n], others, xt, teacher_texts, st, bt
        rows = sigmoid.unit_gradient(x, weight) if total else None
        sums, *kept = _sigmoid_sweep(of, rows, None, keep)
        ctx.save_for_backward(*of, weight, sums, *kept)
        ctx.total, ctx.group = total, group
        ctx.description = {"function": f"backward of {function}", "the loss to differentiate": call}
        if total:
            return (sums[0] if weight is None else sums[0] * weight).sum()
        return sums[0].clone() if xt is None else (sums[0].clone(), sums[3].clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        ranks.agree(ctx.description, ctx.group)
        *of, weight, sums, dx, dt, kept = ctx.saved_tensors
        x, t, scale, bias, *_ = of
        if ctx.total:
            rows = sigmoid.row_gradient(grads[0], weight, len(x))
            dx, dt = dx * grads[0], dt * grads[0]
        else:
            rows = torch.stack(grads)
            _, dx, dt, _ = _sigmoid_sweep(of, rows, kept, False)
        dt_local = dt.new_empty(len(x), dt.shape[1])
        dist.reduce_scatter_tensor(dt_local, dt, group=ctx.group)
        ds, db = sigmoid.by_numbers(rows, sums, scale, bias)
        dweight = None if weight is None else (grads[0] * sums[0]).to(weight.dtype)
        return dx.to(x.dtype), dt_local.to(t.dtype), ds, db, None, dweight, *[None] * 9


def _sigmoid_sweep(
    of: Sequence[Tensor | None], rows: Tensor | None, similarities: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sigmoid.sweep` by whatever computes it."""
    x, t, scale, bias, x_labels, t_labels, xt, tt, st, bt = of
    assert x is not None and t is not None and scale is not None and bias is not None
    assert x_labels is not None and t_labels is not None
    if body_of("sigmoid_sweep", x) == "reference":
        return *reference.sigmoid_sweep(x, t, scale, bias, x_labels, t_labels, xt, tt, st, bt, rows), x.new_empty(0)
    matrices = sigmoid.Matrices(x, t, scale, bias, xt, tt, st, bt)
    return sigmoid.sweep(matrices, x_labels, t_labels, rows, similarities, keep)


def _reduce(losses: Tensor, weight: Tensor | None, reduction: str, group: dist.ProcessGroup) -> Tensor:
    if weight is not None:
        losses = losses * weight
    return losses if reduction == "none" else _over_ranks(losses.sum(), len(losses), reduction, group)


def _over_ranks(local: Tensor, n: int, reduction: str, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' sums, or the mean, of n each."""
    if reduction == "mean":
        local = local / (n * dist.get_world_size(group))
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    return local + (total - local.detach())  # the global value, the local part's gradient


def sharded_contrastive_loss(x, t, s, labels, label_smoothing, weight, reduction, group, memory) -> Tensor:
    name = "contrastive_loss"
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "memory": memory}
    call = ranks.agree(_description(name, x, t, s, labels, weight, options), group)
    losses = _ShardedTerms.apply(x, t, s, labels, label_smoothing, None, None, None, group, memory, name, call)
    return _reduce(losses, weight, reduction, group)


def sharded_contrastive_distillation_loss(
    x, t, s, xt, tt, st, labels, weight, reduction, group, memory
) -> tuple[Tensor, ...]:
    name = "contrastive_distillation_loss"
    teacher = {"teacher_image_features": tuple(xt.shape), "teacher_logit_scale": float(st)}
    options = {**teacher, "reduction": reduction, "memory": memory}
    call = ranks.agree(_description(name, x, t, s, labels, weight, options), group)
    terms = _ShardedTerms.apply(x, t, s, labels, 0.0, xt, tt, st, group, memory, name, call)
    return tuple(_reduce(term, weight, reduction, group) for term in terms)


def sharded_sigmoid_contrastive_loss(x, t, s, b, labels, weight, reduction, group, memory) -> Tensor:
    name = "sigmoid_contrastive_loss"
    options = {"logit_bias": float(b), "reduction": reduction, "memory": memory}
    call = ranks.agree(_description(name, x, t, s, labels, weight, options), group)
    world = dist.get_world_size(group)
    total = reduction != "none" and sigmoid.in_forward(memory, x, t, world)
    keep = not total and sigmoid.keeps(memory, x, t, 1, world)
    by_total = weight if total else None
    losses = _ShardedSigmoid.apply(x, t, s, b, labels, by_total, *[None] * 4, total, keep, group, name, call)
    if total:
        return _over_ranks(losses, len(x), reduction, group)
    return _reduce(losses, weight, reduction, group)


def sharded_sigmoid_contrastive_distillation_loss(
    x, t, s, b, xt, tt, st, bt, labels, weight, reduction, group, memory
) -> tuple[Tensor, ...]:
    name = "sigmoid_contrastive_distillation_loss"
    teacher = {
        "teacher_image_features": tuple(xt.shape),
        "teacher_logit_scale": float(st),
        "teacher_logit_bias": float(bt),
    }
    options = {"logit_bias": float(b), **teacher, "reduction": reduction, "memory": memory}
    call = ranks.agree(_description(name, x, t, s, labels, weight, options), group)
    keep = sigmoid.keeps(memory, x, t, 2, dist.get_world_size(group))
    terms = _ShardedSigmoid.apply(x, t, s, b, labels, None, xt, tt, st, bt, False, keep, group, name, call)
    return tuple(_reduce(term, weight, reduction, group) for term in terms)
