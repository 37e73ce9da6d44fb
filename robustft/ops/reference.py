"""The eager form of every reduction: the oracle of the tests, the peer of the benchmarks and the fallback.

Alphabet: `x` (N, D) image features, `t` (N, D) text features, `s` scale, `z = s x t^T` logits, `q` targets. Each
function materialises `z`, so memory grows with N^2; gradients come from autograd. Half-precision features are widened
to float32 first: logits near 100 in bfloat16 would carry an error of a quarter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid

from robustft.ops.precision import at_least_float32
from robustft.ops.similarity import Coefficients, Statistics


def logits(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(N, M): `s x t^T`."""
    return s.to(at_least_float32(x).dtype) * at_least_float32(x) @ at_least_float32(t).T


def contrastive_targets(labels: Tensor | None, label_smoothing: float, like: Tensor) -> Tensor:
    """(N, N): each row spreads 1 - smoothing over the entries of its own label, and smoothing over all N."""
    labels = torch.arange(len(like), device=like.device) if labels is None else labels
    same = (labels[:, None] == labels[None, :]).to(like.dtype)
    return (1 - label_smoothing) * same / same.sum(1, keepdim=True) + label_smoothing / len(labels)


def contrastive_loss(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, label_smoothing: float) -> Tensor:
    """(N,): the mean of each sample's image-to-text and text-to-image cross-entropies."""
    z = logits(x, t, s)
    q = contrastive_targets(labels, label_smoothing, z)
    return -0.5 * ((q * log_softmax(z, 1)).sum(1) + (q.T * log_softmax(z.T, 1)).sum(1))


def contrastive_distillation_loss(
    x: Tensor, t: Tensor, s: Tensor, xt: Tensor, tt: Tensor, st: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Two (N,): the contrastive loss, and the teacher's cross-entropies in both directions, summed."""
    z, zt = logits(x, t, s), logits(xt, tt, st).detach()
    image, text = zt.softmax(1) * log_softmax(z, 1), zt.T.softmax(1) * log_softmax(z.T, 1)
    return contrastive_loss(x, t, s, labels, 0.0), -(image.sum(1) + text.sum(1))


def sigmoid_signs(x_labels: Tensor, t_labels: Tensor, like: Tensor) -> Tensor:
    """(N, M): 1 where image and text have the same label, else -1."""
    return 2 * (x_labels[:, None] == t_labels[None, :]).to(like.dtype) - 1


def sigmoid_contrastive_loss(x: Tensor, t: Tensor, s: Tensor, b: Tensor, x_labels: Tensor, t_labels: Tensor) -> Tensor:
    """(N,): the sum over an image's pairs with all texts of softplus(-y (z + b))."""
    z = logits(x, t, s) + b.to(at_least_float32(x).dtype)
    return -logsigmoid(sigmoid_signs(x_labels, t_labels, z) * z).sum(1)


def sigmoid_distillation_loss(
    x: Tensor, t: Tensor, s: Tensor, b: Tensor, xt: Tensor, tt: Tensor, st: Tensor, bt: Tensor
) -> Tensor:
    """(N,): the sum over an image's pairs of the cross-entropy against the teacher's probability of the pair."""
    z = logits(x, t, s) + b.to(at_least_float32(x).dtype)
    zt = (logits(xt, tt, st) + bt.to(at_least_float32(x).dtype)).detach()
    return -(zt.sigmoid() * logsigmoid(z) + (-zt).sigmoid() * logsigmoid(-z)).sum(1)


def sigmoid_sweep(
    x: Tensor, t: Tensor, s: Tensor, b: Tensor, x_labels: Tensor, t_labels: Tensor,
    xt: Tensor | None, tt: Tensor | None, st: Tensor | None, bt: Tensor | None, weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(3 or 6, n) losses and derivatives, and dx and dt of the losses weighted by row, from materialised matrices."""
    wide, wide_t = at_least_float32(x), at_least_float32(t)
    similarity = wide @ wide_t.T
    z = s.to(similarity.dtype) * similarity + b.to(similarity.dtype)
    signs = sigmoid_signs(x_labels, t_labels, z)
    slopes, losses = [-signs * (-signs * z).sigmoid()], [sigmoid_contrastive_loss(x, t, s, b, x_labels, t_labels)]
    if xt is not None and tt is not None and st is not None and bt is not None:
        slopes.append(z.sigmoid() - (logits(xt, tt, st) + bt.to(z.dtype)).sigmoid())
        losses.append(sigmoid_distillation_loss(x, t, s, b, xt, tt, st, bt))
    sums = [(loss, (g * similarity).sum(1), g.sum(1)) for loss, g in zip(losses, slopes, strict=True)]
    rows = torch.stack([part for of_loss in sums for part in of_loss])
    if weight is None:
        return rows, wide[:0], wide_t[:0]
    of_rows = weight.to(z.dtype)[:, :, None]
    g = s.to(z.dtype) * sum(w * slope for w, slope in zip(of_rows, slopes, strict=True))
    return rows, g @ wide_t, g.T @ wide


def group_sums(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """(G,) sums of the values of each group and (G,) how many there are."""
    sums = at_least_float32(values).new_zeros(num_groups).index_add(0, groups, at_least_float32(values))
    return sums, torch.bincount(groups, minlength=num_groups)


def risk_of_sums(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(G,) mean of each group, 0 where empty; the first largest of the others' and its group; the counts."""
    mean = sums / counts.clamp(min=1)
    worst_group = mean.masked_fill(counts == 0, -torch.inf).argmax()
    return mean, mean[worst_group], worst_group, counts


def group_risk(losses: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`risk_of_sums` of the losses."""
    return risk_of_sums(*group_sums(losses, groups, num_groups))


def similarity_statistics(
    x: Tensor, t: Tensor, s: Tensor, x_labels: Tensor, t_labels: Tensor,
    xt: Tensor | None, tt: Tensor | None, st: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The rows of `Statistics`, (5 or 8, n) and (5 or 8, m), from materialised matrices."""
    similarity = at_least_float32(x) @ at_least_float32(t).T
    same = x_labels[:, None] == t_labels[None, :]
    teacher = None if xt is None or tt is None else at_least_float32(xt) @ at_least_float32(tt).T

    def statistics(similarity: Tensor, same: Tensor, teacher: Tensor | None) -> Tensor:
        highest = similarity.amax(1, keepdim=True)
        gap = similarity - highest
        z = s.to(gap.dtype) * gap
        found = Statistics(
            max=highest[:, 0],
            log_sum=z.logsumexp(1),
            gap=(z.softmax(1) * gap).sum(1),
            target=(similarity * same).sum(1),
            total=similarity.sum(1),
        )
        if teacher is not None and st is not None:
            high = teacher.amax(1, keepdim=True)
            zt = st.to(gap.dtype) * (teacher - high)
            found = found._replace(
                teacher_max=high[:, 0],
                teacher_log_sum=zt.logsumexp(1),
                teacher_gap=(zt.softmax(1) * gap).sum(1),
            )
        return found.rows()

    return statistics(similarity, same, teacher), statistics(
        similarity.T, same.T, None if teacher is None else teacher.T
    )


def similarity_gradient(
    x: Tensor, t: Tensor, s: Tensor, x_labels: Tensor, t_labels: Tensor,
    xt: Tensor | None, tt: Tensor | None, st: Tensor | None, row: Tensor, col: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (n, D) and dt (m, D) of the rows of `Coefficients`, from materialised matrices."""
    similarity, scale = at_least_float32(x) @ at_least_float32(t).T, s.to(at_least_float32(x).dtype)
    of_rows, of_cols = Coefficients(*row[:, :, None]), Coefficients(*col[:, None, :])

    def softmax_part(c: Coefficients) -> Tensor:
        return c.softmax * (scale * (similarity - c.max) - c.log_sum).exp() - c.uniform

    g = softmax_part(of_rows) + softmax_part(of_cols)
    g = g - (x_labels[:, None] == t_labels[None, :]) * (of_rows.target + of_cols.target)
    if xt is not None and tt is not None and st is not None:
        teacher, teacher_scale = at_least_float32(xt) @ at_least_float32(tt).T, st.to(g.dtype)

        def teacher_part(c: Coefficients) -> Tensor:
            assert c.teacher is not None and c.teacher_max is not None and c.teacher_log_sum is not None
            return c.teacher * (teacher_scale * (teacher - c.teacher_max) - c.teacher_log_sum).exp()

        g = g - (teacher_part(of_rows) + teacher_part(of_cols))
    return (scale * g @ at_least_float32(t)).to(x.dtype), (scale * g.T @ at_least_float32(x)).to(t.dtype)


def class_logits(x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """(N, K): `s x w^T + b`."""
    z = logits(x, w, s)
    return z if bias is None else z + bias.to(z.dtype)


def class_cross_entropy(z: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """(N,): cross-entropy with targets (1 - smoothing) one-hot + smoothing / K."""
    return cross_entropy(z, labels, reduction="none", label_smoothing=label_smoothing)


def soft_cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """(N,): `-sum_k q_k log softmax(z)_k`; rows of q need not sum to one."""
    return -(targets.to(z.dtype) * log_softmax(z, 1)).sum(1)


def dual_risk(x: Tensor, w: Tensor, v: Tensor, s: Tensor, labels: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Two (N,): cross-entropy under w, and under v with soft labels (N, K) or confidences of the label (N,)."""
    empirical = class_cross_entropy(class_logits(x, w, s, None), labels, 0.0)
    z = class_logits(x, v, s, None)
    worst_case = class_cross_entropy(z, labels, 0.0) * core if core.dim() == 1 else soft_cross_entropy(z, core)
    return empirical, worst_case


def misalignment(z: Tensor, labels: Tensor, variant: str, top1: bool) -> Tensor:
    """(N,): the penalty on the classes that rank strictly above the label, 0 where none does.

    With L = logsumexp over those classes - z_y and R = exp(-L): "neg_log_ratio" L, "neg_ratio" 1 - R, "softplus"
    log(1 + 1/R), "ratio" R. NaN counts as above the label, so that a row with one has a penalty of NaN.
    """
    z_label = z.gather(1, labels[:, None])
    above = ~(z <= z_label)
    if top1:
        above &= torch.zeros_like(above).scatter(1, z.argmax(1, keepdim=True), True)
    wrong = above.any(1)
    # Rows without a misranked class get a stand-in of 0, so that neither value nor gradient meets log 0.
    masked = torch.where(above, z, torch.where(wrong[:, None], -torch.inf, 0.0).to(z.dtype))
    gap = torch.where(wrong, masked.logsumexp(1) - z_label[:, 0], 0.0)
    return torch.where(wrong, misalignment_of_gap(gap, variant), 0.0)


def misalignment_of_gap(gap: Tensor, variant: str) -> Tensor:
    """The penalty as a function of L, elementwise."""
    match variant:
        case "neg_log_ratio":
            return gap
        case "neg_ratio":
            return -torch.expm1(-gap)
        case "softplus":
            return torch.logaddexp(gap, torch.zeros_like(gap))  # F.softplus is linear from 20 on, 2e-9 off
        case _:
            return torch.exp(-gap)


def concept_scores(
    x: Tensor, w: Tensor, temperature: float, s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Six (N,) of the cosines: max_cosine, mcm, msp, energy, entropy, prediction. Rows with NaN have NaN scores."""
    cosines = at_least_float32(x) @ at_least_float32(w).T
    highest, s = cosines.amax(1), s.to(cosines.dtype)
    gap = cosines - highest[:, None]
    z = s * cosines
    # As softmax has them, 1 over a sum: exp(max - logsumexp) rounds the logarithm, at large scales to ties near 1.
    mcm, msp = (1 / (scale * gap).exp().sum(1) for scale in (1 / temperature, s))
    negative_entropy = -torch.special.entr(z.softmax(1)).sum(1)
    return highest, mcm, msp, z.logsumexp(1) / s, negative_entropy, cosines.argmax(1)


def row_norms(x: Tensor) -> Tensor:
    """(2,): the lowest and the highest norm of the rows."""
    return torch.stack(torch.aminmax(torch.linalg.vector_norm(at_least_float32(x), dim=1)))


def cvar_weights(losses: Tensor, alpha: float) -> Tensor:
    """(N,): 1/(alpha N) on the worst alpha N losses, the fractional remainder on the next, 0 below; sums to 1."""
    n = len(losses)
    budget = alpha * n
    order = losses.sort(descending=True, stable=True).indices
    share = (budget - torch.arange(n, dtype=losses.dtype, device=losses.device)).clamp(0, 1) / budget
    return torch.empty_like(losses).scatter(0, order, share)


def cvar(losses: Tensor, alpha: float) -> Tensor:
    """0-d: the weighted sum of the losses that count; what does not count may be infinite."""
    weights = cvar_weights(losses.detach(), alpha)
    return (weights * torch.where(weights > 0, losses, 0.0)).sum()


def nearest_neighbors(queries: Tensor, points: Tensor, k: int, squared: bool) -> tuple[Tensor, Tensor]:
    """(Q, k) distances, ascending, and (Q, k) indices: all distances in float64, by differences, sorted.

    NaN for queries that are not finite.
    """
    results = [_sorted_distances(rows, points, k, squared) for rows in _row_blocks(queries, len(points))]
    return torch.cat([distances for distances, _ in results]), torch.cat([indices for _, indices in results])


def kth_neighbor_distance(queries: Tensor, points: Tensor, k: int, squared: bool) -> Tensor:
    """(Q,): the k-th smallest of all distances."""
    blocks = _row_blocks(queries, len(points))
    return torch.cat([_distances(rows, points, squared).kthvalue(k, 1).values for rows in blocks])


def _row_blocks(queries: Tensor, n: int) -> tuple[Tensor, ...]:
    return queries.split(max(1, 2**22 // n))


def _distances(queries: Tensor, points: Tensor, squared: bool) -> Tensor:
    exact = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = torch.where(queries.isfinite().all(1, keepdim=True), exact, torch.nan)
    return (exact.square() if squared else exact).to(at_least_float32(points[:0]).dtype)


def _sorted_distances(queries: Tensor, points: Tensor, k: int, squared: bool) -> tuple[Tensor, Tensor]:
    distances, indices = _distances(queries, points, squared).sort(dim=1, stable=True)
    return distances[:, :k], indices[:, :k]
