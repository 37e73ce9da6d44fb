"""Losses on class logits z = s x w^T + b: csrc/cpu/class_losses.cpp and triton/classes.py compute them whole.

`dual_risk` has two heads: its w (2K, D) holds one below the other, its statistics likewise; the compiled body takes
two matrices (K, D) as well, of which it need not make one. With the statistics of each
row (max, log_sum, gaps and means; `above` the softmax over the classes that rank strictly above the label), smoothing e
and K classes,

    cross_entropy_i = log_sum + (1 - e) (max - z_y) + e (max - mean z)
    L_i             = above_log_sum + (max - z_y)      logsumexp of the misranked classes - z_y; top-1: max - z_y
    misalignment_i  = f(L_i), 0 where nothing is misranked;   f as named in ops/reference.py
    worst_case_i    = (sum q) log_sum + sum q (max - z)     confidences: q = confidence 1_y

and with per-sample gradients g, h of the two terms

    G_i = g (p - (1 - e) 1_y - e / K) + h f'(L_i) (above - 1_y)          soft: g ((sum q) p - q)

The scale's derivative of each is the same expression with z replaced by S and log_sum by a mean. A NaN among a row's
logits makes all its terms NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustft.ops import layouts, reference, registry
from robustft.ops.arguments import check_classes
from robustft.ops.dispatch import body_of
from robustft.ops.registry import (
    Backward,
    Call,
    Op,
    Source,
    accumulation_dtype,
    both,
    call,
    contiguous_like,
    gradient,
    reduced,
    register,
)


class Statistics(NamedTuple):
    """Of the rows of one head's logits, each (n,): class_statistic in csrc/cpu/classes.h, in its order."""

    max: Tensor
    log_sum: Tensor
    above_log_sum: Tensor
    """-inf where nothing ranks above the label, NaN where a logit is."""
    mean: Tensor
    label_gap: Tensor
    label: Tensor
    above_mean: Tensor
    max_s: Tensor
    mean_gap: Tensor
    row_mean: Tensor


class TargetStatistics(NamedTuple):
    """Of the rows with soft targets of the last head: these follow its `Statistics`."""

    mass: Tensor
    gap: Tensor
    target: Tensor


class Coefficients(NamedTuple):
    """Of the rows of one head's gradient, each (n,): class_coefficient in csrc/cpu/classes.h, in its order."""

    max: Tensor
    log_sum: Tensor
    above_log_sum: Tensor
    softmax: Tensor
    label: Tensor
    uniform: Tensor
    targets: Tensor
    above: Tensor


def classification_loss(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    variant: str,
    top1: bool,
    label_smoothing: float,
    memory: str | int,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Cross-entropy and misalignment: of two (N,) what `registry.reduced` gives."""
    body = body_of("classification_loss", x)
    if body != "compiled":
        check_classes(labels, w.shape[0])
    if body == "reference":
        z = reference.class_logits(x, w, scale, bias)
        cross_entropy = reference.class_cross_entropy(z, labels, label_smoothing)
        misalignment = reference.misalignment(z, labels, variant, top1)
        return reduced(cross_entropy, weight, reduction), reduced(misalignment, weight, reduction)
    keep = layouts.fits(memory, body, x.shape[0], w.shape[0], x, 1) and torch.is_grad_enabled()
    inputs = x, w, scale, bias, labels, variant, top1, label_smoothing, keep
    try:
        return call("classification_loss", *inputs, weight=weight, reduction=reduction)
    except RuntimeError:  # the kernel looks at the labels too, sooner than torch's operators do
        check_classes(labels, w.shape[0])
        raise


def dual_risk(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    scale: Tensor,
    labels: Tensor,
    core: Tensor,
    memory: str | int,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Empirical and worst-case risk: of two (N,) what `registry.reduced` gives."""
    body = body_of("dual_risk", x)
    if body != "compiled":
        check_classes(labels, w.shape[0])
    if body == "reference":
        empirical, worst_case = reference.dual_risk(x, w, v, scale, labels, core)
        return reduced(empirical, weight, reduction), reduced(worst_case, weight, reduction)
    keep = layouts.fits(memory, body, x.shape[0], w.shape[0], x, 2) and torch.is_grad_enabled()
    try:
        return call("dual_risk", x, w, v, scale, labels, core, keep, weight=weight, reduction=reduction)
    except RuntimeError:  # as in `classification_loss`
        check_classes(labels, w.shape[0])
        raise


def _classification_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep, mean=False):
    how = variant, top1, label_smoothing, keep, mean, torch.get_float32_matmul_precision()
    return torch.ops.robustft.class_losses(x, w, scale, bias, labels, *how)


def _classification_gradient(g, h, x, w, scale, bias, labels, top1, label_smoothing, *kept):
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.class_gradients(g, h, x, w, scale, bias, labels, top1, label_smoothing, *kept, precision)


def _dual_risk(x, w, scale, labels, core, keep, mean=False):
    how = keep, mean, torch.get_float32_matmul_precision()
    return torch.ops.robustft.dual_losses(x, *_heads(w), scale, labels, core, *how)


def _dual_gradient(g, h, x, w, scale, labels, core, *kept):
    precision = torch.get_float32_matmul_precision()
    return torch.ops.robustft.dual_gradients(g, h, x, *_heads(w), scale, labels, core, *kept, precision)


def _heads(w: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return w if isinstance(w, tuple) else w.chunk(2)


def _fake_statistics(x, w, scale, bias, labels, targets, heads, misranked, means, keep, precision):
    dtype = accumulation_dtype(x.dtype)
    kinds = heads * len(Statistics._fields) + (0 if targets is None else len(TargetStatistics._fields))
    n = x.shape[0]
    return x.new_empty(kinds, n, dtype=dtype), x.new_empty(n if keep else 0, w.shape[0], dtype=dtype)


def _fake_gradient(x, w):
    return contiguous_like(x), contiguous_like(w), w.new_empty(w.shape[0], dtype=accumulation_dtype(w.dtype))


def _fake_kept(op: str, x: Tensor, k: int, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    """What only a device's own backward reads."""
    return layouts.classes(registry.body(op, x.device, x.dtype), x.shape[0], k, heads, keep, x.dtype).like(x)


def _fake_loss(x, w, scale, bias, labels, variant, top1, label_smoothing, keep):
    cross_entropy, misalignment, by_gap = (x.new_empty(len(x), dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    by_scale = by_gap.new_empty(2, len(x))
    return cross_entropy, misalignment, by_gap, by_scale, *_fake_kept("classification_loss", x, w.shape[0], 1, keep)


def _fake_dual_risk(x, w, scale, labels, core, keep):
    empirical, worst_case = (x.new_empty(len(x), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return empirical, worst_case, empirical.new_empty(2, len(x)), *_fake_kept("dual_risk", x, w.shape[0] // 2, 2, keep)


def _fake_class_losses(x, w, scale, bias, labels, variant, top1, label_smoothing, keep, mean, precision):
    by_gap = x.new_empty(len(x), dtype=accumulation_dtype(x.dtype))
    return *_fake_two(x, mean), by_gap, *_fake_compiled(x, len(w), 1, keep)


def _fake_dual_losses(x, w, v, scale, labels, core, keep, mean, precision):
    return *_fake_two(x, mean), *_fake_compiled(x, len(w), 2, keep)


def _fake_two(x: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Two losses, of each sample or their means."""
    loss = x.new_empty(() if mean else (len(x),), dtype=accumulation_dtype(x.dtype))
    return loss, torch.empty_like(loss)


def _fake_compiled(x: Tensor, k: int, heads: int, keep: bool) -> tuple[Tensor, ...]:
    """by_scale, softmaxes and exponentials."""
    by_scale = x.new_empty(2, len(x), dtype=accumulation_dtype(x.dtype))
    return by_scale, *layouts.classes("compiled", len(x), k, heads, keep, x.dtype).like(x)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.top1, ctx.label_smoothing, _ = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else the backward would be given zeros of the size of what is kept


def _backward(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 9
    g, h = both(g, h)
    x, w, scale, bias, labels, *kept = ctx.saved_tensors
    dx, dw, db, ds = gradient(
        "classification_loss", g, h, x, w, scale, bias, labels, ctx.top1, ctx.label_smoothing, *kept
    )
    return dx, dw, ds, None if bias is None else db.to(bias.dtype), None, None, None, None, None


def _setup_dual(ctx, inputs, output):
    x, w, *tensors, _ = inputs
    _, _, *kept = output
    ctx.apart = isinstance(w, tuple)
    ctx.save_for_backward(x, *(w if ctx.apart else (w,)), *tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else the backward would be given zeros of the size of what is kept


def _backward_dual(ctx, g, h, *_):
    if g is None and h is None:
        return (None,) * 6
    g, h = both(g, h)
    x, *rest = ctx.saved_tensors
    heads, rest = ((rest[0], rest[1]), rest[2:]) if ctx.apart else (rest[0], rest[1:])
    return *gradient("dual_risk", g, h, x, heads, *rest), None, None, None


def _class_inputs(source: Source, heads: int, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Features of nine samples, embeddings of five classes a head, a scale."""
    return source.features(9, 6, grad), source.features(5 * heads, 6, grad), source.scale(7.0, grad)


def _sample_statistics(source: Source) -> Iterator[tuple]:
    x, w, scale = _class_inputs(source, 2, grad=False)
    labels, targets = source.labels(9, 5), source.uniform(9, 5)
    yield x, w, scale, None, labels, targets, 2, True, True, True, "highest"
    yield x, w[:5], scale, source.normal(5), labels, None, 1, True, True, False, "highest"


def _sample_gradient(source: Source) -> Iterator[tuple]:
    for *inputs, heads, misranked, means, keep, precision in _sample_statistics(source):
        statistics, exponentials = torch.ops.robustft.class_statistics(
            *inputs, heads, misranked, means, keep, precision
        )
        per_head = len(Statistics._fields)
        rows: list[Tensor] = []
        for head in range(heads):
            of = Statistics(*statistics[head * per_head : (head + 1) * per_head])
            rest = source.uniform(5, len(of.max)).to(statistics.dtype)
            rows += Coefficients(of.max, of.log_sum, of.above_log_sum, *rest)
        yield *inputs, heads, exponentials, torch.stack(rows), False, precision


def _sample_classification(source: Source) -> Iterator[tuple]:
    x, w, scale = _class_inputs(source, 1)
    labels = source.labels(9, 5)
    yield x, w, scale, source.normal(5, grad=True), labels, "softplus", False, 0.1, False
    yield x, w, scale, None, labels, "neg_log_ratio", True, 0.0, True


def _sample_dual(source: Source) -> Iterator[tuple]:
    inputs = *_class_inputs(source, 2), source.labels(9, 5)
    yield *inputs, source.uniform(9, 5), False
    yield *inputs, source.uniform(9), True


def _detached(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)


def _with_means(samples: Iterable[tuple]) -> Iterator[tuple[tuple, bool]]:
    """Every other sample with the means of its losses."""
    return ((inputs, i % 2 == 0) for i, inputs in enumerate(samples))


def _sample_class_losses(source: Source) -> Iterator[tuple]:
    yield from ((*_detached(inputs), mean, "highest") for inputs, mean in _with_means(_sample_classification(source)))


def _sample_class_gradients(source: Source) -> Iterator[tuple]:
    for inputs in _sample_class_losses(source):
        *tensors, _, top1, label_smoothing, _, _, precision = inputs
        cross_entropy, misalignment, *kept = torch.ops.robustft.class_losses(*inputs)
        g, h = torch.ones_like(cross_entropy), torch.ones_like(misalignment)
        yield g, h, *tensors, top1, label_smoothing, *kept, precision


def _sample_dual_losses(source: Source) -> Iterator[tuple]:
    for inputs, mean in _with_means(_sample_dual(source)):
        x, w, *rest = _detached(inputs)
        yield x, *w.chunk(2), *rest, mean, "highest"


def _sample_dual_gradients(source: Source) -> Iterator[tuple]:
    for inputs in _sample_dual_losses(source):
        *tensors, _, _, precision = inputs
        empirical, worst_case, *kept = torch.ops.robustft.dual_losses(*inputs)
        yield torch.ones_like(empirical), torch.ones_like(worst_case), *tensors, *kept, precision


def _call_classification(source: Source) -> Iterator[Call]:
    for x, w, scale, bias, labels, variant, top1, label_smoothing, keep in _sample_classification(source):
        options = {"bias": bias, "variant": variant, "top1": top1, "label_smoothing": label_smoothing}
        yield Call((x, w, labels, scale), {**options, "memory": "auto" if keep else 0})


def _call_dual(source: Source) -> Iterator[Call]:
    for x, w, scale, labels, core, keep in _sample_dual(source):
        heads = (head.detach().requires_grad_() for head in w.chunk(2))
        yield Call((x, *heads, labels, core, scale), {"memory": "auto" if keep else 0})


register(Op("class_statistics", _fake_statistics, _sample_statistics))
register(Op("class_gradient", lambda x, w, *_: _fake_gradient(x, w), _sample_gradient))
register(Op("class_losses", _fake_class_losses, _sample_class_losses))
register(
    Op(
        "class_gradients",
        lambda g, h, x, w, scale, *_: (*_fake_gradient(x, w), torch.empty_like(scale)),
        _sample_class_gradients,
    )
)
register(Op("dual_losses", _fake_dual_losses, _sample_dual_losses))
register(
    Op(
        "dual_gradients",
        lambda g, h, x, w, v, scale, *_: (
            contiguous_like(x),
            w.new_empty(2 * len(w), w.shape[1]),
            torch.empty_like(scale),
        ),
        _sample_dual_gradients,
    )
)
register(
    Op(
        "classification_loss",
        _fake_loss,
        _sample_classification,
        body=_classification_loss,
        kernel="class_losses",
        backward=Backward(
            _setup,
            _backward,
            lambda g, h, x, w, scale, *_: (*_fake_gradient(x, w), torch.empty_like(scale)),
            _classification_gradient,
            results=2,
            means=True,
        ),
        triton="classes",
        public=_call_classification,
    )
)
register(
    Op(
        "dual_risk",
        _fake_dual_risk,
        _sample_dual,
        body=_dual_risk,
        kernel="dual_losses",
        backward=Backward(
            _setup_dual,
            _backward_dual,
            lambda g, h, x, w, scale, *_: (*_fake_gradient(x, w)[:2], torch.empty_like(scale)),
            _dual_gradient,
            results=2,
            means=True,
            joined=1,
        ),
        triton="classes",
        public=_call_dual,
    )
)
