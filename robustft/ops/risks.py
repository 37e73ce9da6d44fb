"""Operators on N losses, or N rows of logits, that exist already.

On the CPU their bodies are compiled whole: csrc/cpu/group_risk.cpp, misalignment.cpp and cvar.cpp; for CUDA
csrc/cuda/group_risk.cu and cvar.cu are, and triton/misalignment.py. Where only `group_sums` has a body, `group_risk` is
composed from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustft.ops import reference, registry
from robustft.ops.arguments import check_classes, check_range
from robustft.ops.dispatch import body_of
from robustft.ops.precision import at_least_float32
from robustft.ops.registry import Backward, Call, Op, Source, accumulation_dtype, call, contiguous_like, register


def group_risk(losses: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of each group, the largest, and the groups' sizes."""
    body = body_of("group_risk", losses)
    if body != "compiled":
        check_range("groups", groups, num_groups)
    if body == "reference":
        mean, worst, _, counts = reference.group_risk(losses, groups, num_groups)
        return mean, worst, counts
    try:
        mean, worst, _, counts = call("group_risk", losses, groups, num_groups)
    except RuntimeError:  # the kernel looks at the groups too, sooner than torch's operators do
        check_range("groups", groups, num_groups)
        raise
    return mean, worst, counts


def misalignment_penalty(logits: Tensor, labels: Tensor, variant: str, top1: bool) -> tuple[Tensor, Tensor]:
    """(N,), and how many rows have a misranked class."""
    body, k = body_of("misalignment_penalty", logits), logits.shape[1]
    if body != "compiled":
        check_classes(labels, k)
    if body == "reference":
        z = at_least_float32(logits)
        errors = (~(z <= z.gather(1, labels[:, None]))).any(1).sum()
        return reference.misalignment(z, labels, variant, top1), errors
    try:
        penalty, errors = call("misalignment_penalty", logits, labels, variant, top1)
    except RuntimeError:  # as in `group_risk`
        check_classes(labels, k)
        raise
    return penalty, errors


def cvar(losses: Tensor, alpha: float) -> Tensor:
    """0-d."""
    if body_of("cvar", losses) == "reference":
        return reference.cvar(at_least_float32(losses), alpha)
    return call("cvar", losses, alpha)[0]


def _group_risk(losses, groups, num_groups):
    return reference.risk_of_sums(*torch.ops.robustft.group_sums(losses, groups, num_groups))


def _group_risk_gradient(mean, worst, groups, worst_group, counts):
    by_group = worst.new_zeros(counts.shape) if mean is None else mean
    if worst is not None:
        by_group = by_group.index_add(0, worst_group.reshape(1), worst.reshape(1))
    return (by_group / counts.clamp(min=1))[groups]


def _setup_group_risk(ctx, inputs, output):
    losses, groups, _ = inputs
    _, _, worst_group, counts = output
    ctx.dtype = losses.dtype
    ctx.save_for_backward(groups, worst_group, counts)
    ctx.mark_non_differentiable(worst_group, counts)
    ctx.set_materialize_grads(False)


def _backward_group_risk(ctx, mean, worst, *_):
    if mean is None and worst is None:
        return None, None, None
    gradient = registry.gradient("group_risk", mean, worst, *ctx.saved_tensors)
    return gradient if gradient.dtype == ctx.dtype else gradient.to(ctx.dtype), None, None


def _fake_sums(values, groups, num_groups):
    sums = values.new_empty(num_groups, dtype=accumulation_dtype(values.dtype))
    return sums, groups.new_empty(num_groups, dtype=torch.int64)


def _fake_group_risk(losses, groups, num_groups):
    mean, counts = _fake_sums(losses, groups, num_groups)
    return mean, mean.new_empty(()), counts.new_empty(()), counts


def _fake_group_risk_gradient(mean, worst, groups, worst_group, counts):
    return groups.new_empty(groups.shape, dtype=(worst if mean is None else mean).dtype)


def _setup_misalignment(ctx, inputs, output):
    logits, labels, _, ctx.top1 = inputs
    _, errors, kept = output
    ctx.save_for_backward(logits, labels, kept)
    ctx.mark_non_differentiable(errors, kept)
    ctx.set_materialize_grads(False)


def _backward_misalignment(ctx, grad, *_):
    if grad is None:
        return None, None, None, None
    logits, labels, kept = ctx.saved_tensors
    gradient = registry.gradient("misalignment_penalty", grad, logits, labels, ctx.top1, kept)
    return gradient, None, None, None


def _fake_misalignment(logits, labels, variant, top1):
    penalty = logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    return penalty, labels.new_empty((), dtype=torch.int64), penalty.new_empty(3, logits.shape[0])


def _setup_cvar(ctx, inputs, output):
    losses, ctx.alpha = inputs
    ctx.save_for_backward(losses, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_cvar(ctx, grad, *_):
    if grad is None:
        return None, None
    losses, boundary = ctx.saved_tensors
    return registry.gradient("cvar", grad, losses, ctx.alpha, boundary), None


def _fake_cvar(losses, alpha):
    dtype = accumulation_dtype(losses.dtype)
    return losses.new_empty((), dtype=dtype), losses.new_empty(2, dtype=torch.float64)


def _sample_groups(source: Source) -> Iterator[tuple]:
    yield source.normal(9, grad=True), source.labels(9, 4), 6


def _sample_misalignment(source: Source) -> Iterator[tuple]:
    yield from ((source.normal(9, 5, grad=True), source.labels(9, 5), "softplus", top1) for top1 in (False, True))


def _sample_cvar(source: Source) -> Iterator[tuple]:
    yield source.normal(9, grad=True), 0.3


def _call_misalignment(source: Source) -> Iterator[Call]:
    for logits, labels, variant, top1 in _sample_misalignment(source):
        yield Call((logits, labels), {"variant": variant, "top1": top1})


def _weights(source: Source) -> Tensor:
    """Of four groups, in the dtype of what weighs losses."""
    return source.uniform(4).to(accumulation_dtype(source.dtype))


def _call_group_dro(source: Source) -> Iterator[Call]:
    yield Call((source.normal(9, grad=True), source.labels(9, 4), _weights(source), 0.1))


register(
    Op(
        "group_sums",
        _fake_sums,
        lambda source: ((losses.detach(), *rest) for losses, *rest in _sample_groups(source)),
    )
)
register(
    Op(
        "group_risk",
        _fake_group_risk,
        _sample_groups,
        body=_group_risk,
        kernel="group_sums",
        backward=Backward(
            _setup_group_risk, _backward_group_risk, _fake_group_risk_gradient, _group_risk_gradient, results=4
        ),
        public=lambda source: map(Call, _sample_groups(source)),
    )
)
register(
    Op(
        "misalignment_penalty",
        _fake_misalignment,
        _sample_misalignment,
        backward=Backward(
            _setup_misalignment, _backward_misalignment, lambda grad, logits, *_: contiguous_like(logits), results=2
        ),
        triton="misalignment",
        public=_call_misalignment,
    )
)
register(
    Op(
        "cvar",
        _fake_cvar,
        _sample_cvar,
        backward=Backward(_setup_cvar, _backward_cvar, lambda grad, losses, *_: contiguous_like(losses)),
        public=lambda source: map(Call, _sample_cvar(source)),
    )
)
registry.PUBLIC["group_dro"] = _call_group_dro
registry.PUBLIC["group_dro_weights"] = lambda source: [Call((_weights(source), _weights(source), 0.1))]
