"""Zero-shot: the classifier that a CLIP model is before any training.

w_c = normalize(mean over templates of normalize(g(template(c)))),   p = softmax(s u w^T)
SigLIP, each class by itself: sigmoid(s u w^T + b)
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.outputs import evaluating
from robustft.clip.prompts import captions, split_names
from robustft.files import load_fitted, save_fitted
from robustft.ops.kinds import checked
from robustft.ops.processes import current
from robustft.predictors.base import Classifier

KIND = "Head"


@torch.no_grad()
@checked
def zero_shot_classifier(
    model: nn.Module,
    *,
    tokenizer: Any,
    class_names: Sequence[str] | Mapping[str, str],
    templates: Sequence[Any],
    truncate: bool = False,
    batch_size: int = 256,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Classifier:
    """The zero-shot classifier of a model, with the model's own scale and bias; it shares `model` (see `Classifier`).

    class_names: in the order of the labels, or {name in data sets, such as a folder: name in captions}, whose keys are
    the predictor's `classes`. truncate, batch_size: as for `clip.class_embeddings`. cache: a folder that keeps heads,
    each under a checksum of the model and of the tokens of all captions. progress: a bar on a terminal. A damaged file
    of the cache is replaced with a warning.

    Source: Radford et al., CLIP (arXiv 2103.00020), section 3.1.4. Code that multiplies by 100, whatever
    the model's scale, gets the same accuracy and another calibration.
    """
    classes, names = split_names(class_names)
    groups = clip.group_captions(tokenizer, captions(names, templates), names=names, truncate=truncate)
    path = None if cache is None else _place(Path(cache), model, groups)
    embeddings = None if path is None else _read(path, len(classes), next(model.parameters()))
    if embeddings is None:
        with evaluating(model):
            embeddings = clip.grouped_embeddings(model, groups, batch_size=batch_size, progress=progress)
        if path is not None and current().main:
            save_fitted(path, KIND, {}, {"class_embeddings": embeddings})
    return Classifier(model, embeddings, classes, logit_bias=clip.logit_bias(model))


def _place(cache: Path, model: nn.Module, groups: clip.CaptionGroups) -> Path:
    """The file of the head that a model makes of these captions."""
    digest = hashlib.sha256(f"{clip.fingerprint(model)} {groups.sizes}".encode())
    for part in (groups.tokens, groups.rows):
        digest.update(part.cpu().long().contiguous().numpy().data)
    return cache / f"head-{digest.hexdigest()}.safetensors"


def _read(path: Path, classes: int, like: Tensor) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        found: Tensor = load_fitted(path, KIND)[1]["class_embeddings"]
        if found.ndim != 2 or len(found) != classes:
            raise ValueError(f"{path}: holds a head {tuple(found.shape)}, expected one of {classes} classes")
        return found.to(like.device)
    except ValueError as error:
        warnings.warn(f"{error}; encoding the captions again", RuntimeWarning, stacklevel=4)
        return None
