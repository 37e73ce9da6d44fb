"""Zero-shot: the classifier that a CLIP model is before any training.

w_c = normalize(mean over templates of normalize(g(template(c)))),   p = softmax(s u w^T)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from robustft import clip
from robustft.clip.outputs import evaluating
from robustft.clip.prompts import split_names
from robustft.ops.kinds import checked
from robustft.predictors.base import Classifier


@torch.no_grad()
@checked
def zero_shot_classifier(
    model: nn.Module,
    *,
    tokenizer: Any,
    class_names: Sequence[str] | Mapping[str, str],
    templates: Sequence[Any],
    truncate: bool = False,
) -> Classifier:
    """The zero-shot classifier of a model, with the model's own scale; it shares `model` (see `Classifier`).

    class_names: in the order of the labels, or {name in data sets, such as a folder: name in captions}, whose keys are
    the predictor's `classes`. truncate: as for `clip.class_embeddings`.

    Source: Radford et al., CLIP (arXiv 2103.00020), section 3.1.4. Code that multiplies by 100, whatever
    the model's scale, gets the same accuracy and another calibration.
    """
    with evaluating(model):
        embeddings = clip.class_embeddings(model, tokenizer, class_names, templates, truncate=truncate)
    return Classifier(model, embeddings, split_names(class_names)[0])
