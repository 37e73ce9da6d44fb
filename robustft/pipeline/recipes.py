"""How each method is trained unless told otherwise. Loads nothing heavy: the command line reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robustft.machine import WEIGHT_DECAY


@dataclass(frozen=True)
class Recipe:
    """How one method is trained: the method's class, one of robustft.methods or "module:Class" of your own, its own
    options, and the loop's."""

    method: str
    lr: float
    epochs: int = 10
    batch_size: int = 128
    weight_decay: float = WEIGHT_DECAY
    warmup: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)


# CaRot's teacher: every 2 of 70 steps is as large a part of the run as the paper's every 500 of 25,030.
RECIPES = {
    "FT": Recipe("FineTune", lr=3e-3),
    "FLYP": Recipe("FLYP", lr=3e-3),
    "CaRot": Recipe("CaRot", lr=3e-3, options={"ema_interval": 2}),
}
"""Of the quickstart, for its tiny model."""
QUICK_EPOCHS = 4

SEEDS = (0, 1, 2)
"""Of the study."""

WORLDS = ("digits", "icons")
"""The bundled benchmarks, of which `robustft.pipeline.worlds` tells the rest."""
DEFAULT_WORLD = "digits"
"""The benchmark of the quickstart unless told otherwise."""
STUDY_WORLD = "icons"
"""That of the study: it decides more claims there."""

_TOWERS: dict[str, Any] = {"lr": 1e-5, "batch_size": 64}
LORA_LR = 2e-4
"""Of towers with adapters alone: CLIP-LoRA's (Zanella and Ben Ayed, CVPRW 2024, arXiv 2405.18541)."""
_PROMPTS: dict[str, Any] = {"lr": 2e-3, "batch_size": 32, "epochs": 50, "weight_decay": 0.0}
_CACHES: dict[str, Any] = {"lr": 1e-3, "batch_size": 64, "epochs": 20, "weight_decay": 0.0}

# Of pre-trained models. Towers: FLYP's and CaRot's 1e-5 (their batch of 512 is what a GPU holds, not what a folder of
# photographs fills), LP-FT's 1e-5 after a probe. Prompts: CoOp's 0.002 and 50 epochs. Caches: Tip-Adapter-F's 0.001
# and 20 epochs. All with this package's AdamW and cosine.
OWN: Mapping[str, Recipe] = {
    "CaRot": Recipe("CaRot", **_TOWERS),
    "FLYP": Recipe("FLYP", **_TOWERS),
    "FineTune": Recipe("FineTune", **_TOWERS),
    "LPFT": Recipe("LPFT", **_TOWERS),
    "LipsumFT": Recipe("LipsumFT", **_TOWERS),
    "CARFT": Recipe("CARFT", **_TOWERS),
    "StarFT": Recipe("StarFT", **_TOWERS),
    "DRM": Recipe("DRM", **_TOWERS),
    "GroupDRO": Recipe("WorstCaseFineTune", **_TOWERS, options={"risk": {"risk": "GroupDRO"}}),
    "WorstGroup": Recipe("WorstCaseFineTune", **_TOWERS, options={"risk": {"risk": "WorstGroup"}}),
    "CVaR": Recipe("WorstCaseFineTune", **_TOWERS, options={"risk": {"risk": "CVaR", "alpha": 0.2}}),
    "LinearProbe": Recipe("LinearProbe", lr=0.1, batch_size=64, epochs=20),
    "CoOp": Recipe("CoOp", **_PROMPTS),
    "KgCoOp": Recipe("KgCoOp", **_PROMPTS),
    "ProDA": Recipe("ProDA", **_PROMPTS),
    "LoCoOp": Recipe("LoCoOp", **_PROMPTS),
    "MaPLe": Recipe("MaPLe", **_PROMPTS),
    "CoCoOp": Recipe("CoCoOp", lr=2e-3, batch_size=8, epochs=10, weight_decay=0.0),
    "CLIPAdapter": Recipe("CLIPAdapter", **_CACHES),
    "TipAdapterF": Recipe("TipAdapterF", **_CACHES),
}
"""Of own data, by the name that `robustft train --method` takes, whatever its case and hyphens."""

NEEDS: Mapping[str, str] = {
    "DRM": "descriptions of the classes (--descriptions)",
    "GroupDRO": "groups in the data (--groups)",
    "WorstGroup": "groups in the data (--groups)",
    "LPFT": "nothing more: its linear probe is trained first",
    "CARFT": "two templates or more (--templates simple or imagenet)",
    "StarFT": "captions with spurious attributes: methods: {StarFT: {options: {spurious: [...]}}} in a file of options",
}
"""What a method asks for beside labelled images."""


def recipe_named(name: str) -> tuple[str, Recipe]:
    """A recipe of `OWN` and its name there, of "carot", "lp-ft", "CoOp"; that of a method of one's own, "module:Class",
    as a fine-tuning of both towers. ValueError naming those there are."""
    if ":" in name:
        return name.partition(":")[2], Recipe(name, **_TOWERS)
    plain = {key.lower(): key for key in OWN}
    key = plain.get(name.lower().replace("-", "").replace("_", ""))
    if key is None:
        raise ValueError(f"methods: {str(name)!r} is none of {', '.join(OWN)}; your own is module:Class")
    return key, OWN[key]
