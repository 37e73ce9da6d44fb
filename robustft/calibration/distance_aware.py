"""DAC, distance-aware calibration: a prompt learner is tempered on classes that its prompts have moved away from.

t_c, b_j  unit text embeddings of class c and of the J classes trained on, by the learnt prompts
t0, b0    the same by the zero-shot ones

    d_c     = mean of the k smallest |t_c - b_j|
    gamma_c = exp(-d_c) / exp(-d0_c)          1 where the smallest is below `known`: c was trained on
    z'      = gamma_c z,  c = argmax z        keeps every prediction
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.ops.arguments import array, check_count, checked, described

KNOWN = 0.05


@checked
def distance_aware_scales(
    embeddings: Tensor,
    trained: Tensor,
    zero_shot_embeddings: Tensor,
    zero_shot_trained: Tensor,
    *,
    k: int = 5,
    known: float = KNOWN,
) -> Tensor:
    """gamma (K,) of `distance_aware_logits`, float64, no gradient: what logits of a predicted class are multiplied by.

    Args:
        embeddings, trained: of the K classes to tell apart (K, D), and of the J classes trained on (J, D), both by the
            learnt prompts; rows are normalised here.
        zero_shot_embeddings, zero_shot_trained: (K, D') and (J, D') of the same classes by the zero-shot prompts.
        k: how many of the nearest trained classes count, at most J.
        known: a class with a trained one nearer than this was trained on, and keeps its logits.

    Fit a temperature on trained classes beside it, if at all: DAC is for the others. ValueError for shapes that do not
    match. Memory: K J float64. Source: Wang et al., Open-Vocabulary Calibration for Fine-tuned CLIP (ICML 2024, arXiv
    2402.04655), and its released code.
    """
    given = {
        "embeddings": embeddings,
        "trained": trained,
        "zero_shot_embeddings": zero_shot_embeddings,
        "zero_shot_trained": zero_shot_trained,
    }
    for name, rows in given.items():
        if array(name, rows).ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
            raise ValueError(f"{name} is {described(rows)}; expected floating (classes, D), not empty")
    for first, second in (("embeddings", "trained"), ("zero_shot_embeddings", "zero_shot_trained")):
        if given[first].shape[1] != given[second].shape[1]:
            raise ValueError(
                f"{second} are {given[second].shape[1]} wide, {first} {given[first].shape[1]}: expected one text space"
            )
    for first, second in (("embeddings", "zero_shot_embeddings"), ("trained", "zero_shot_trained")):
        if len(given[first]) != len(given[second]):
            raise ValueError(f"{second} are of {len(given[second])} classes, {first} of {len(given[first])}")
    check_count("k", k, len(trained))
    if not known >= 0.0:
        raise ValueError(f"known must be at least 0, got {known!r}")
    learnt, before = (
        _nearest(given[rows], given[base], k)
        for rows, base in (("embeddings", "trained"), ("zero_shot_embeddings", "zero_shot_trained"))
    )
    gamma = (before.mean(1) - learnt.mean(1)).exp()
    return torch.where(learnt[:, 0] < known, torch.ones_like(gamma), gamma)


@checked
def distance_aware_logits(logits: Tensor, scales: Tensor) -> Tensor:
    """Logits (N, K) times the scale, of `scales` (K,), of the class that each predicts: every prediction stays.

    float64. Gradient to the logits. ValueError for shapes that do not match, and scales that are not positive. Source:
    as above.
    """
    if array("logits", logits).ndim != 2 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(f"logits is {described(logits)}; expected floating (N, K), not empty")
    fits = array("scales", scales).shape == logits.shape[1:] and scales.is_floating_point() and not scales.is_meta
    if not fits or not bool((scales > 0.0).all()):
        raise ValueError(f"scales is {described(scales)}; expected ({logits.shape[1]},), one positive number a class")
    return logits.double() * scales.to(logits.device).double()[logits.argmax(1)][:, None]


def _nearest(rows: Tensor, base: Tensor, k: int) -> Tensor:
    """Distances (K, k) of unit rows to the nearest of the unit base, ascending."""
    u, v = (F.normalize(x.detach().double(), dim=1) for x in (rows, base))
    return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False).values
