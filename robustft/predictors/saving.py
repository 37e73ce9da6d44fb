"""Any predictor that was saved, given back: each class reads its own directory, told by the file that lies in it.

classifier.safetensors    in what `clip.export` writes: a predictor of one model (`ModelPredictor`)
ensemble.safetensors      beside one directory for each member: a predictor of predictors (`ensembles.Composite`)

Both are what `files.save_fitted` writes, of the class's `kind`.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import torch

from robustft import clip
from robustft.files import fitted_kind
from robustft.ops.kinds import checked
from robustft.predictors.base import Predictor

ENSEMBLE_FILE = "ensemble.safetensors"
HOMES = ("robustft.ensembles", "robustft.methods")  # where more classes of predictors are: they are known once imported


@checked
def load_predictor(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Predictor:
    """What the `save` of any predictor wrote, an ensemble too; `device` and `dtype` of its models as in `clip.load`.

    The tokenizer, transforms and configuration of one model come from `clip.load("local-dir:<directory>")`.
    FileNotFoundError for a directory without a predictor, ValueError that names the file for a damaged one.
    """
    directory = Path(directory)
    path = directory / ENSEMBLE_FILE
    if not path.is_file():
        path = directory / clip.CLASSIFIER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a directory that a predictor's save wrote holds one")
    kind = fitted_kind(path)
    if kind not in Predictor.kinds:
        for home in HOMES:
            import_module(home)
    if kind not in Predictor.kinds:
        raise ValueError(f"{path}: holds a {kind}, expected one of {', '.join(sorted(Predictor.kinds))}")
    return Predictor.kinds[kind].restore(directory, device, dtype)
