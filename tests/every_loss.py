"""Methods with every kind of loss there is, on the tiny CLIP, in float64: do the parts of a batch add up to it?"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import open_clip
import torch
from small_options import ANCHORED, PROMPTED
from tiny_clip import CONFIG, NAMES, TEMPLATES, letters

from benchmarks.architectures import small
from robustft import methods
from robustft.methods.objective import Objective

PROMPTS = {"tokenizer": letters, "class_names": NAMES, "templates": TEMPLATES}
N = 13
DESCRIPTIONS = {"ant": "six legs", "bee": ["striped", "it flies"], "cow": "horns"}
OF_A_BATCH = Objective(misalignment=0.5, terms={"mdca": 1.0, "mmce": 0.5, "logit_range": 0.1})
FOCAL = Objective(focal=2.0)

OPTIONS = {
    "FLYP": {"misalignment": 0.5, "l2_sp": 0.1},
    "FLYP, labels": {"targets": "label", "label_smoothing": 0.1},
    "FLYP, sigmoid": {"loss": "sigmoid"},
    "CaRot": {"total_steps": 4, "ema_interval": 2, "misalignment": 0.5},
    "CaRot, beta": {
        "total_steps": 4,
        "teacher": "beta",
        "feature_weight": 0.5,
        "cross_distillation_weight": 0.5,
        "interactive_weight": 0.5,
    },
    "FLYP, SigLIP": {},  # whose loss is the one that the model was made for
    "CaRot, SigLIP": {"total_steps": 4, "ema_interval": 2},
    "DRM": {"descriptions": DESCRIPTIONS, "text_chunk": 2},
    "DRM, present": {"descriptions": DESCRIPTIONS, "present_only": True, "empirical_weight": 0.0},
    "FineTune": {"objective": Objective(misalignment=0.5), "l2_sp": 0.1},
    "FineTune, of a batch": {"objective": OF_A_BATCH},
    **ANCHORED,
    "LipsumFT": {**ANCHORED["LipsumFT"], "l2_sp": 0.1},
    "CARFT, of a batch": {**ANCHORED["CARFT"], "objective": OF_A_BATCH},
    "StarFT": {**ANCHORED["StarFT"], "total_steps": 4},
    "WorstCaseFineTune": {"risk": methods.GroupDRO(2, 0.1)},
    "WorstCaseFineTune, worst": {"risk": methods.WorstGroup(2)},
    "WorstCaseFineTune, cvar": {"risk": methods.CVaR(0.3)},
    "LinearProbe": {},
    "LinearProbe, of a batch": {"objective": OF_A_BATCH},
    **{name: PROMPTED.get(getattr(methods, name), {}) for name in ("CLIPAdapter", "CoOp", "KgCoOp", "LoCoOp")},
    **{name: PROMPTED.get(getattr(methods, name), {}) for name in ("CoCoOp", "ProDA", "MaPLe")},
    "CoCoOp, of a batch": {"context": 3, "objective": FOCAL},
    "MaPLe, of a batch": {"context": 3, "objective": FOCAL},
    "TipAdapterF": {},
}


def data():
    """A batch of N rows, with groups."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(N, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (N,), generator=generator)
    return {"image": images, "label": labels, "group": torch.arange(N) % 2}


def make(name, dropout=0.0):
    """A method in training mode, one step after its start, so that CaRot's teacher teaches."""
    torch.manual_seed(0)
    config, prompts = copy.deepcopy(CONFIG["model_cfg"]), PROMPTS
    config["vision_cfg"]["patch_dropout"] = dropout
    if "SigLIP" in name:
        with tempfile.TemporaryDirectory() as folder:
            model, _, _, prompts = small("ViT-B-16-SigLIP2", Path(folder))
    else:
        model = open_clip.CLIP(**config, init_logit_bias=-2.0 if "sigmoid" in name else None)
    kind = getattr(methods, name.partition(",")[0])
    options = dict(OPTIONS[name])
    if kind is methods.TipAdapterF:
        options["train"] = (data()["image"][:6], data()["label"][:6])
    method = kind(model.double(), **prompts, **options)
    if kind is methods.DRM:
        method.prepare((data()["image"], data()["label"]))
    method.train()
    with torch.no_grad():  # away from the teacher and the start
        for p in method.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    method.steps += 1
    return method


def gradients(method, loss):
    """Those of a loss, by the names of the parameters."""
    method.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
