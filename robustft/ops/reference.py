"""The eager form of every reduction: the oracle of the tests, the peer of the benchmarks and the fallback.

Alphabet: `x` (N, D) image features, `t` (N, D) text features, `s` scale, `z = s x t^T` logits, `q` targets. Each
function materialises `z`, so memory grows with N^2; gradients come from autograd. Half-precision features are widened
to float32 first: logits near 100 in bfloat16 would carry an error of a quarter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def widen(tensor: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def logits(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(N, M): `s x t^T`."""
    return s.to(widen(x).dtype) * widen(x) @ widen(t).T


def contrastive_targets(labels: Tensor, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """(N, N): each row spreads 1 - smoothing over the entries of its own label, and smoothing over all N."""
    same = (labels[:, None] == labels[None, :]).to(dtype)
    return (1 - label_smoothing) * same / same.sum(1, keepdim=True) + label_smoothing / len(labels)


def contrastive_loss(x: Tensor, t: Tensor, s: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """(N,): the mean of each sample's image-to-text and text-to-image cross-entropies."""
    z = logits(x, t, s)
    q = contrastive_targets(labels, label_smoothing, z.dtype)
    return -0.5 * ((q * log_softmax(z, 1)).sum(1) + (q.T * log_softmax(z.T, 1)).sum(1))


def contrastive_distillation_loss(
    x: Tensor, t: Tensor, s: Tensor, xt: Tensor, tt: Tensor, st: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Two (N,): the contrastive loss, and the teacher's cross-entropies in both directions, summed."""
    z, zt = logits(x, t, s), logits(xt, tt, st).detach()
    image, text = zt.softmax(1) * log_softmax(z, 1), zt.T.softmax(1) * log_softmax(z.T, 1)
    return contrastive_loss(x, t, s, labels, 0.0), -(image.sum(1) + text.sum(1))


def group_sums(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """(G,) sums of the values of each group and (G,) how many there are."""
    sums = widen(values).new_zeros(num_groups).index_add(0, groups, widen(values))
    return sums, torch.bincount(groups, minlength=num_groups)


def similarity_statistics(
    x: Tensor, t: Tensor, s: Tensor, x_labels: Tensor, t_labels: Tensor,
    xt: Tensor | None, tt: Tensor | None, st: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(5 or 7, n) and (5 or 7, m): the statistics of csrc/cpu/similarity.cpp, from materialised matrices."""
    similarity = widen(x) @ widen(t).T
    same = x_labels[:, None] == t_labels[None, :]
    teacher = None if xt is None else logits(xt, tt, st)

    def statistics(similarity: Tensor, same: Tensor, teacher: Tensor | None) -> Tensor:
        highest = similarity.amax(1, keepdim=True)
        gap = similarity - highest
        z = s.to(gap.dtype) * gap
        parts = [highest[:, 0], z.logsumexp(1), (z.softmax(1) * gap).sum(1)]
        parts += [(similarity * same).sum(1), similarity.sum(1)]
        if teacher is not None:
            parts += [teacher.logsumexp(1), (teacher.softmax(1) * gap).sum(1)]
        return torch.stack(parts)

    return statistics(similarity, same, teacher), statistics(
        similarity.T, same.T, None if teacher is None else teacher.T
    )


def similarity_gradient(
    x: Tensor, t: Tensor, s: Tensor, x_labels: Tensor, t_labels: Tensor,
    xt: Tensor | None, tt: Tensor | None, st: Tensor | None, row: Tensor, col: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (n, D) and dt (m, D) of the coefficients in csrc/cpu/similarity.cpp, from materialised matrices."""
    similarity, scale = widen(x) @ widen(t).T, s.to(widen(x).dtype)
    row, col = row[:, :, None], col[:, None, :]
    g = sum(c[2] * (scale * (similarity - c[0]) - c[1]).exp() - c[4] for c in (row, col))
    g = g - (x_labels[:, None] == t_labels[None, :]) * (row[3] + col[3])
    if xt is not None:
        g = g - sum(c[6] * (logits(xt, tt, st) - c[5]).exp() for c in (row, col))
    return (scale * g @ widen(t)).to(x.dtype), (scale * g.T @ widen(x)).to(t.dtype)
