"""Terms that keep a classifier's confidence honest while it is trained: of logits z (N, K) and labels y (N,).

p = softmax(z), confidence c_i = max_k p_ik, correctness a_i = [argmax_k z_ik = y_i], all means over the batch:

    focal               mean_i -(1 - p_iy)^gamma log p_iy                      in the place of the cross-entropy
    Brier               mean_i sum_k (p_ik - [k = y_i])^2
    DCA                 |mean_i c_i - mean_i a_i|
    MDCA                1/K sum_k |mean_i p_ik - mean_i [k = y_i]|
    MMCE                sqrt(1/N^2 sum_ij (a_i - c_i) (a_j - c_j) exp(-|c_i - c_j| / width))
    MbLS                1/(N K) sum_ik max(0, max_j z_ij - z_ik - margin)
    confidence penalty  mean_i sum_k p_ik log p_ik                             the negative entropy
    logit range         1/(N K) sum_ik max(0, z_ik - high_i) + max(0, low_i - z_ik)

Each is `term(logits, labels)`, a 0-d mean with a gradient to the logits, in float32 at least, also under autocast.
All but focal, which takes a place of its own, go by name in an objective: the logit range, which needs the zero-shot
model's, from `methods.objective.ZERO_SHOT_TERMS`, the others from its `TERMS` at their defaults; another setting is
another name there:

    TERMS["mbls_6"] = functools.partial(margin_penalty, margin=6.0)
    Objective(terms={"mbls_6": 0.1})

a_i carries no gradient: it is piecewise constant. DCA, MDCA and MMCE measure a whole batch, and on a small one mostly
its noise; the others are means of samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.ops import arguments
from robustft.ops.precision import at_least_float32


@arguments.own_precision
def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 3.0) -> Tensor:
    """Focal loss: cross-entropy, each sample weighted by (1 - p_y)^gamma; gamma = 0 is cross-entropy.

    gamma 1 to 3 is usual for calibration. The weight has a gradient too. log(1 - p_y) is computed from the other
    classes' logits, so samples that are certain to the last bit keep finite gradients. K of at least 2. Source: Lin et
    al. 2017 (arXiv 1708.02002); for calibration Mukhoti et al. 2020 (arXiv 2002.09437).
    """
    z = _checked(logits, labels)
    if not gamma >= 0.0:
        raise ValueError(f"gamma is {gamma}; expected at least 0")
    if z.shape[1] < 2:
        raise ValueError("the focal loss needs at least two classes, got logits of one")
    y = labels[:, None]
    lse = z.logsumexp(1)
    log_true = z.gather(1, y).squeeze(1) - lse
    log_others = z.scatter(1, y, -torch.inf).logsumexp(1) - lse
    return -(torch.exp(gamma * log_others) * log_true).mean()


@arguments.own_precision
def brier_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Brier score of the softmax, 0 to 2: a proper score that is bounded. Source: Brier 1950."""
    p = _checked(logits, labels).softmax(1)
    return (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean()


@arguments.own_precision
def dca_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """DCA: how far the batch's mean confidence is from its accuracy; usual weight 1.

    Source: Liang et al. 2020 (arXiv 2009.04057).
    """
    confidence, correct = _confidence(_checked(logits, labels), labels)
    return (confidence.mean() - correct.mean()).abs()


@arguments.own_precision
def mdca_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """MDCA: how far each class's mean probability in the batch is from its frequency there; usual weight 1.

    Source: Hebbalaguppe et al. 2022 (arXiv 2203.13834), equation 5, as released.
    """
    p = _checked(logits, labels).softmax(1)
    frequency = torch.bincount(labels, minlength=p.shape[1]).to(p.dtype) / len(p)
    return (p.mean(0) - frequency).abs().mean()


@arguments.own_precision
def mmce_loss(logits: Tensor, labels: Tensor, width: float = 0.4, squared: bool = False) -> Tensor:
    """MMCE: the maximum mean discrepancy of correctness and confidence under a Laplacian kernel of `width`.

    squared: without the root, which the paper has and the code of Mukhoti et al. (weight 2) has not. Where the
    discrepancy is exactly zero the root gets a zero gradient, not NaN. Memory: N^2. Source: Kumar et al. 2018 (ICML),
    section 3, the unweighted form.
    """
    if not width > 0.0:
        raise ValueError(f"width is {width}; expected a positive number")
    confidence, correct = _confidence(_checked(logits, labels), labels)
    gap = correct - confidence
    kernel = torch.exp(-(confidence[:, None] - confidence).abs() / width)
    discrepancy = (gap[:, None] * gap * kernel).mean()
    if squared:
        return discrepancy
    # The kernel is positive definite; rounding is not.
    positive = discrepancy > 0.0
    return torch.where(positive, torch.where(positive, discrepancy, 1.0).sqrt(), discrepancy * 0.0)


@arguments.own_precision
def margin_penalty(logits: Tensor, labels: Tensor, margin: float = 10.0) -> Tensor:
    """MbLS: logits may lie `margin` below the largest of their row, and are pulled up beyond that; usual weight 0.1.

    At CLIP's scale of 100 a margin of 10 is a cosine gap of 0.1. Source: Liu et al. 2022 (arXiv 2111.15430), with the
    released margin and mean over samples and classes.
    """
    if not margin >= 0.0:
        raise ValueError(f"margin is {margin}; expected at least 0")
    z = _checked(logits, labels)
    return torch.relu(z.amax(1, keepdim=True) - z - margin).mean()


@arguments.own_precision
def confidence_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative entropy of the predictions in nats, -log K to 0; usual weight 0.1.

    Source: Pereyra et al. 2017 (arXiv 1701.06548). Labels are only checked.
    """
    log_p = _checked(logits, labels).log_softmax(1)
    return (log_p.exp() * log_p).sum(1).mean()


@arguments.own_precision
def logit_range_penalty(logits: Tensor, labels: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """What the logits exceed the zero-shot model's range by; usual weight 10.

    low, high: the zero-shot logits' smallest and largest: of each sample, (N, 1) tensors, as released, which is what
    `Objective(terms={"logit_range": 10.0})` computes in every method that takes an objective; or two numbers for the
    whole training set, as a term of another name:

        z0 = zero_shot.predict(train).logits
        TERMS["one_range"] = functools.partial(logit_range_penalty, low=float(z0.min()), high=float(z0.max()))

    No gradient to the range. Source: Murugesan et al. 2024 (arXiv 2407.13588), the penalty; `rescale_to_range` is its
    other form.
    """
    z = _checked(logits, labels)
    low, high = (torch.as_tensor(end, dtype=z.dtype, device=z.device).detach() for end in (low, high))
    _check_range(z, low, high)
    return (torch.relu(z - high) + torch.relu(low - z)).mean()


@arguments.own_precision
def rescale_to_range(logits: Tensor, zero_shot_logits: Tensor) -> Tensor:
    """Each row of logits (N, K) mapped linearly onto the range of its zero-shot logits (N, K'); keeps every argmax.

    ZS-Norm is the cross-entropy of the result, `Objective(rescale="zero_shot")`; SaLS is the same at test time only. A
    constant row becomes the middle of the range. Gradients to the logits. Source: Murugesan et al. 2024 (arXiv
    2407.13588).
    """
    for name, x in (("logits", logits), ("zero_shot_logits", zero_shot_logits)):
        if not x.is_floating_point() or 0 in x.shape or x.device != logits.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected floating (N, K), on one device"
            )
    z, z0 = (at_least_float32(x) for x in (logits, zero_shot_logits.detach()))
    if z.ndim != 2 or z0.ndim != 2 or len(z) != len(z0):
        raise ValueError(
            f"logits {tuple(z.shape)} and zero_shot_logits {tuple(z0.shape)} must be (N, K) and (N, K') of one N"
        )
    low, high = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
    low0, high0 = z0.amin(1, keepdim=True), z0.amax(1, keepdim=True)
    spread = high - low
    share = torch.where(spread > 0.0, (z - low) / torch.where(spread > 0.0, spread, 1.0), 0.5)
    return low0 + (high0 - low0) * share


def _confidence(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    top, prediction = z.softmax(1).max(1)
    return top, (prediction == labels).to(z.dtype)


def _check_range(z: Tensor, low: Tensor, high: Tensor) -> None:
    for name, end in (("low", low), ("high", high)):
        if end.shape not in ((), (len(z), 1)):
            raise ValueError(f"{name} has shape {tuple(end.shape)}; expected a number or ({len(z)}, 1), one a sample")


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits is {tuple(logits.shape)} {logits.dtype}; expected floating (N, K), not empty")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels is {tuple(labels.shape)} {labels.dtype}; expected ({len(logits)},) torch.int64")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}; expected {logits.device}, as logits")
    arguments.check_range("labels", labels, logits.shape[1])
    return at_least_float32(logits)
