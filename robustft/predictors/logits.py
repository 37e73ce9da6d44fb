"""Logits (N, K) of one model or of two: how good they are, and their mixture."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture_log_probabilities(
    zero_shot: Tensor, fine_tuned: Tensor, alpha: float | Tensor, temperatures: tuple[float, float]
) -> Tensor:
    """log[(1 - a) softmax(z_zs / T_zs) + a softmax(z_ft / T_ft)], (N, K), without leaving log space.

    alpha: a number, or one for each sample (N,).
    """
    t_zs, t_ft = temperatures
    log_zs, log_ft = (zero_shot / t_zs).log_softmax(-1), (fine_tuned / t_ft).log_softmax(-1)
    if isinstance(alpha, Tensor):
        share = alpha.to(log_ft)[:, None]
        return torch.logaddexp(log_zs + torch.log1p(-share), log_ft + share.log())
    if alpha in (0.0, 1.0):
        return log_ft if alpha else log_zs
    return torch.logaddexp(log_zs + math.log1p(-alpha), log_ft + math.log(alpha))


def accuracy_and_nll(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood of logits (N, K), in float64."""
    labels = labels.long()
    return (logits.argmax(-1) == labels).double().mean().item(), F.cross_entropy(logits.double(), labels).item()


def preference(accuracy: float, nll: float) -> tuple[float, float]:
    """The key by which `min` and `sorted` choose on validation data: the highest accuracy; of equals the lowest NLL."""
    return -accuracy, nll
