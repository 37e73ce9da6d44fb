"""Scores of class cosines (csrc/cpu/scores.cpp, triton/scores.py), in today's float32 precision. No gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops import reference, registry
from robustft.ops.arguments import readable
from robustft.ops.dispatch import body_of, chosen
from robustft.ops.registry import Call, Op, Source, accumulation_dtype, computed, register


class Scores(NamedTuple):
    """Each (N,): class_score in csrc/cpu/scores.h, in its order, and the predicted class."""

    max_cosine: Tensor
    mcm: Tensor
    msp: Tensor
    energy: Tensor
    entropy: Tensor
    prediction: Tensor


def concept_scores(x: Tensor, w: Tensor, temperature: float, scale: Tensor) -> tuple[Scores, list[float]]:
    """The scores of unit rows x against unit rows w; the lowest and the highest norm of the rows of x, and of w, to be
    checked, or nothing where numbers are not looked at."""
    body, looked = body_of("concept_scores", x), readable(x)
    if looked and body == "compiled" and not torch._C._len_torch_dispatch_stack():
        precision = torch.get_float32_matmul_precision()
        with torch._C._AutoDispatchBelowAutograd():
            *scores, found = torch.ops.robustft.unit_scores(x, w, temperature, scale, precision)
        return Scores._make(scores), found.tolist()
    x, w, scale = x.detach(), w.detach(), scale.detach()
    of_rows = [*norms(x), *norms(w)] if looked else []
    if body == "reference":
        return Scores(*reference.concept_scores(x, w, temperature, scale)), of_rows
    all_scores, prediction = computed("concept_scores", x, w, temperature, scale)
    return Scores._make((*all_scores.unbind(), prediction)), of_rows


def norms(features: Tensor) -> tuple[float, float]:
    """The lowest and the highest norm of the rows, NaN if one is."""
    compiled = chosen() != "reference" and registry.body("row_norms", features.device, features.dtype) == "compiled"
    low, high = (torch.ops.robustft.row_norms.default if compiled else reference.row_norms)(features).tolist()
    return low, high


def _concept_scores(x, w, temperature, scale):
    return torch.ops.robustft.class_scores(x, w, temperature, scale, torch.get_float32_matmul_precision())


def _fake(x, w, temperature, scale, precision=None):
    n, kinds = x.shape[0], len(Scores._fields) - 1
    return x.new_empty(kinds, n, dtype=accumulation_dtype(x.dtype)), x.new_empty(n, dtype=torch.int64)


def _fake_unit(x, w, temperature, scale, precision):
    scores, prediction = _fake(x, w, temperature, scale)
    return *(torch.empty_like(score) for score in scores), prediction, scores.new_empty(4)


def _sample(source: Source) -> Iterator[tuple]:
    yield source.features(9, 6, False), source.features(5, 6, False), 0.5, source.scale(7.0, False)


def _call(source: Source) -> Iterator[Call]:
    for x, w, temperature, scale in _sample(source):
        yield Call((x, w), {"temperature": temperature, "logit_scale": scale})


register(
    Op("class_scores", _fake, lambda source: ((*inputs, "highest") for inputs in _sample(source)), triton="scores")
)
register(Op("unit_scores", _fake_unit, lambda source: ((*inputs, "highest") for inputs in _sample(source))))
register(Op("concept_scores", _fake, _sample, body=_concept_scores, kernel="class_scores", public=_call))
register(
    Op(
        "row_norms",
        lambda x: x.new_empty(2, dtype=accumulation_dtype(x.dtype)),
        lambda source: [(source.normal(9, 6),)],
    )
)
