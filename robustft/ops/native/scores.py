"""Scores of class cosines: the compiled kernel (csrc/cpu/scores.cpp) in today's float32 precision. No gradients."""

from __future__ import annotations

import torch

from robustft.ops.native.registration import accumulation_dtype, composite, fake

_SCORES = 5  # class_score in csrc/cpu/scores.h: max_cosine, mcm, msp, energy, entropy


def _concept_scores(x, w, temperature, scale):
    return torch.ops.robustft.class_scores(x, w, temperature, scale, torch.get_float32_matmul_precision())


def _fake(x, w, temperature, scale, precision=None):
    n = x.shape[0]
    return x.new_empty(_SCORES, n, dtype=accumulation_dtype(x.dtype)), x.new_empty(n, dtype=torch.int64)


def register() -> None:
    fake("class_scores", _fake)
    composite("concept_scores", _concept_scores, _fake)
