"""What the study trains, and how.

`python -m benchmarks.study_selection` compares the learning rates, and the settings of the worst-case risks, on ID
validation data and chose those here (benchmarks/results/study_selection.json). FT, FLYP and CaRot on the digits have
the quickstart's, chosen in the same way. All else is the methods' default, or shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robustft.pipeline.recipes import RECIPES, Recipe

PROBE = Recipe("LinearProbe", lr=1.0, epochs=20)
LP_FT = Recipe("LPFT", lr=1e-3)
DRM = Recipe("DRM", lr=3e-3)

SINGLE = "concepts alone (single risk)"
SPURIOUS: Mapping[str, Recipe] = {
    "FT": replace(RECIPES["FT"], lr=3e-3),
    "FLYP": replace(RECIPES["FLYP"], lr=1e-3),
    "group DRO": Recipe(
        "WorstCaseFineTune", lr=1e-3, options={"risk": {"risk": "GroupDRO", "num_groups": 2, "step_size": 0.01}}
    ),
    "worst group": Recipe("WorstCaseFineTune", lr=1e-3, options={"risk": {"risk": "WorstGroup", "num_groups": 2}}),
    "CVaR": Recipe("WorstCaseFineTune", lr=3e-3, options={"risk": {"risk": "CVaR", "alpha": 0.1}}),
    SINGLE: Recipe("DRM", lr=1e-3, options={"worst_case_weight": 1.0, "empirical_weight": 0.0}),
    "DRM": Recipe("DRM", lr=3e-3),
}
"""On coloured grounds that go with the class; DRM's with its default proxy and lambda."""


def _host(method: str, lr: float, epochs: int = 30, batch_size: int = 40, **options: Any) -> Recipe:
    return Recipe(method, lr=lr, epochs=epochs, batch_size=batch_size, weight_decay=0.0, options=options)


HOSTS: Mapping[str, Recipe] = {
    "linear probe": _host("LinearProbe", lr=0.1),
    "LP-FT": _host("LPFT", lr=3e-4),
    "CoOp": _host("CoOp", lr=0.05, epochs=50, context=4),
    "KgCoOp": _host("KgCoOp", lr=0.1, epochs=50, context=4, weight=1.0),
    "ProDA": _host("ProDA", lr=0.01, epochs=50, context=4, prompts=8, prompt_batch=4),
    "LoCoOp": _host("LoCoOp", lr=0.02, epochs=50, context=4),
    "CoCoOp": _host("CoCoOp", lr=0.1, epochs=10, batch_size=8, context=4),
    "MaPLe": _host("MaPLe", lr=0.1, context=2),
    "CLIP-Adapter": _host("CLIPAdapter", lr=0.01, ratio=0.6),
    "Tip-Adapter-F": _host("TipAdapterF", lr=0.01, alpha=3.0, beta=5.0),
}
"""Few-shot methods with class logits, chosen at `HOST_SHOTS` images a class."""
HOST_SHOTS = 8


def _prompt(host: str, epochs: int, batch_size: int = 40, **options: Any) -> Recipe:
    recipe = HOSTS[host]
    return replace(recipe, epochs=epochs, batch_size=batch_size, options={**recipe.options, **options})


PROMPTS: Mapping[str, Recipe] = {
    "CoOp": _prompt("CoOp", epochs=5),
    "CoOp + ZS-Norm": _prompt("CoOp", epochs=5, objective={"rescale": "zero_shot"}),
    "KgCoOp": _prompt("KgCoOp", epochs=5),
    "MaPLe": _prompt("MaPLe", epochs=5),
    "CoCoOp": _prompt("CoCoOp", epochs=1, batch_size=8),
}
"""Of two hundred classes, with about as many steps as few-shot recipes have; a quarter for CoCoOp."""
