"""sigmoid_contrastive_loss, forward and backward.

    L = 1/N sum_ij softplus(-y_ij (s x_i . t_j + b)),  gradients of x (N, D), t (N, D), s and b

Least work: one product for the logits and one for each gradient, 6 N^2 D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.ops import reference

from . import bar
from .work import Candidate, Row, Work, compiled, forward_backward, generator, leaf, ours, pairs, panel, peer, scale

SIZES = (1024, 2048, 4096, 16384)
BIAS = -10.0


def inputs(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, t = pairs(generator(row), row.n, row.d)
    return leaf(x, row), leaf(t, row), scale(), torch.tensor(BIAS, requires_grad=True)


def eager(x: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
    z = s * x @ t.T + b
    return F.softplus(z).sum() / len(x) - z.diagonal().mean()


def with_labels(x: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """robustft's own eager form, which takes any labels and so holds an N x N matrix of signs."""
    labels = torch.arange(len(x))
    return reference.sigmoid_contrastive_loss(x, t, s, b, labels, labels).mean()


def siglip_loss() -> Callable[..., Tensor]:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


def candidates(row: Row) -> list[Candidate]:
    found = [
        ours("sigmoid_contrastive_loss", row, forward_backward),
        panel("sigmoid_contrastive_loss", row, forward_backward),
        peer("eager", row, forward_backward(eager), matrices=4),
        peer("open_clip", row, forward_backward(siglip_loss()), matrices=6),
    ]
    if row in bar.rows("sigmoid") and row.n > 512 and row.precision == "highest":
        found += [
            peer("robustft reference", row, forward_backward(with_labels), matrices=7),
            compiled(eager, row, matrices=4),
        ]
    return found


WORK = Work(
    "sigmoid",
    rows=(*bar.rows("sigmoid"), *(Row("sigmoid", n, 768) for n in SIZES), Row("sigmoid", 512, dtype="bfloat16")),
    quick=(*bar.rows("sigmoid", quick=True), Row("sigmoid", 1024, 768)),
    inputs=inputs,
    candidates=candidates,
    reference=forward_backward(with_labels),
    flops=lambda row: 6 * row.n**2 * row.d,
    formula="6 N^2 D",
)


def test_sigmoid(race, row):
    race(WORK, row)
