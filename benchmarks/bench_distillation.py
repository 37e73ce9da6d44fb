"""contrastive_distillation_loss, forward and backward: CaRot's two terms in one.

    L = contrastive - mean_i [softmax(z')_i . log softmax(z)_i + the same of the columns]
    z = s x t^T,   z' = s' x' t'^T

with gradients of x, t and s. Least work: both logits and two gradients, 8 N^2 D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.ops import reference

from . import bar
from .work import Candidate, Row, Work, compiled, forward_backward, generator, leaf, ours, pairs, panel, peer, scale

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
DIMENSIONS = (128, 1024)


def inputs(row: Row) -> tuple[Tensor, ...]:
    rng = generator(row)
    student, teacher = pairs(rng, row.n, row.d), pairs(rng, row.n, row.d)
    dtype = getattr(torch, row.dtype)
    return *(leaf(f, row) for f in student), scale(), *(f.to(dtype) for f in teacher), scale().detach()


def eager(x: Tensor, t: Tensor, s: Tensor, xt: Tensor, tt: Tensor, st: Tensor) -> Tensor:
    z, teacher = s * x @ t.T, st * xt @ tt.T
    y = torch.arange(len(x))
    contrastive = (F.cross_entropy(z, y) + F.cross_entropy(z.T, y)) / 2
    image = (teacher.softmax(1) * z.log_softmax(1)).sum(1).mean()
    text = (teacher.T.softmax(1) * z.T.log_softmax(1)).sum(1).mean()
    return contrastive - image - text


def with_targets(x: Tensor, t: Tensor, s: Tensor, xt: Tensor, tt: Tensor, st: Tensor) -> Tensor:
    """robustft's own eager form, which takes any targets and so holds an N x N matrix of them."""
    terms = reference.contrastive_distillation_loss(x, t, s, xt, tt, st, torch.arange(len(x)))
    return sum(term.mean() for term in terms)


def distill_clip_loss() -> Callable[..., Tensor]:
    from open_clip.loss import DistillClipLoss

    loss = DistillClipLoss()

    def total(*features: Tensor) -> Tensor:
        contrastive, distillation = loss(*features)
        return contrastive + 2 * distillation  # open_clip's is the mean of both directions

    return total


def candidates(row: Row) -> list[Candidate]:
    def both(function: Callable[..., tuple[Tensor, Tensor]]):
        def total(*features: Tensor, **options: int) -> Tensor:
            contrastive, distillation = function(*features, **options)
            return contrastive + distillation  # not sum(), which begins by adding 0

        return forward_backward(total)

    found = [
        ours("contrastive_distillation_loss", row, both),
        peer("eager", row, forward_backward(eager), matrices=10),
        peer("open_clip", row, forward_backward(distill_clip_loss()), matrices=12),
    ]
    if row.n > 512:
        found.insert(1, panel("contrastive_distillation_loss", row, both))
    if row in bar.rows("distillation") and row.n > 512:
        found += [
            peer("robustft reference", row, forward_backward(with_targets), matrices=14),
            compiled(eager, row, matrices=10),
        ]
    return found


WORK = Work(
    "distillation",
    rows=(
        *bar.rows("distillation"),
        *(Row("distillation", n) for n in SIZES),
        *(Row("distillation", 2048, d) for d in DIMENSIONS),
        Row("distillation", 512, dtype="bfloat16"),
    ),
    quick=(*bar.rows("distillation", quick=True), Row("distillation", 1024)),
    inputs=inputs,
    candidates=candidates,
    reference=forward_backward(with_targets),
    flops=lambda row: 8 * row.n**2 * row.d,
    formula="8 N^2 D",
)


def test_distillation(race, row):
    race(WORK, row)
