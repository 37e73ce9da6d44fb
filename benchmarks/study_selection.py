"""The study's learning rates, and the settings of its worst-case risks, by ID validation data.

    python -m benchmarks.study_selection                     # results/study_selection.json; some 360 short trainings
    python -m benchmarks.study_selection --names CoOp "DRM, spurious"      # some of them, beside what is there

A candidate is chosen for each method by its mean accuracy on the ID validation split over the seeds, of equals by its
NLL there. No test image is looked at. `robustft/pipeline/study/recipes.py` holds what was chosen; tests compare both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from robustft.methods import CoreProxy, Predictor
from robustft.pipeline.recipes import Recipe
from robustft.pipeline.study.drm import Spurious
from robustft.pipeline.study.recipes import DRM, HOST_SHOTS, HOSTS, LP_FT, PROBE, SINGLE, SPURIOUS
from robustft.pipeline.study.world import World
from robustft.predictors.logits import accuracy_and_nll, preference

from . import machine

TOWERS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # where the image tower is trained
HEADS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)  # where a head is
PROMPTS = (5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1)
ADAPTERS = (1e-3, 3e-3, 1e-2, 3e-2)
RATES: Mapping[str, Sequence[float]] = {
    "LinearProbe": HEADS,
    "CLIPAdapter": ADAPTERS,
    "TipAdapterF": ADAPTERS,
    **dict.fromkeys(("CoOp", "KgCoOp", "ProDA", "LoCoOp", "CoCoOp", "MaPLe"), PROMPTS),
    **dict.fromkeys(("LPFT", "DRM", "FineTune", "FLYP", "WorstCaseFineTune"), TOWERS),
}
"""The learning rates that are compared, by method."""
RISKS: Mapping[str, Sequence[dict[str, Any]]] = {
    "group DRO": [{"risk": "GroupDRO", "num_groups": 2, "step_size": eta} for eta in (0.01, 0.1)],
    "CVaR": [{"risk": "CVaR", "alpha": alpha} for alpha in (0.1, 0.3)],
}


@dataclass(frozen=True)
class Setting:
    """One recipe of the study: how it is trained in a world, and on which set it is judged."""

    recipe: Recipe
    train: Callable[[World, Recipe], Predictor]
    spurious: bool = False

    def candidates(self, name: str) -> list[Recipe]:
        risks = [{"risk": risk} for risk in RISKS.get(name.removesuffix(", spurious"), ())] or [{}]
        rates = RATES[self.recipe.method]
        return [replace(self.recipe, lr=lr, options={**self.recipe.options, **risk}) for risk in risks for lr in rates]


@cache
def world_of(folder: str, seed: int) -> World:
    """A process's own, for all its candidates."""
    return World(Path(folder) / str(seed), seed, world="digits", log=lambda text: None)


@cache
def sets(world: World) -> Spurious:
    return Spurious(world)


def _host(world: World, recipe: Recipe) -> Predictor:
    return world.few_shot(recipe, HOST_SHOTS).classifier()


def _spurious(world: World, recipe: Recipe) -> Predictor:
    return sets(world).trained(recipe)


SETTINGS = {
    "LP": Setting(PROBE, World.linear_probe),
    "linear probe": Setting(HOSTS["linear probe"], _host),
    "LP-FT": Setting(LP_FT, World.lp_ft),
    "DRM": Setting(DRM, World.drm),
    **{
        f"{name}, spurious": Setting(recipe, _spurious, spurious=True)
        for name, recipe in SPURIOUS.items()
        if recipe.method != "DRM"
    },
    f"{SINGLE}, spurious": Setting(
        SPURIOUS[SINGLE], lambda world, recipe: sets(world).drm(recipe, CoreProxy(one_hot=1.0)), spurious=True
    ),
    "DRM, spurious": Setting(
        SPURIOUS["DRM"], lambda world, recipe: sets(world).drm(recipe, CoreProxy()), spurious=True
    ),
    **{f"{name}, few-shot": Setting(recipe, _host) for name, recipe in HOSTS.items() if name != "linear probe"},
}
"""LP-FT starts from the probes of the recipes: where another rate is chosen for these, LP-FT is compared again."""


def score(folder: str, name: str, recipe: Recipe, seed: int) -> tuple[float, float]:
    """A candidate's accuracy and NLL on ID validation data."""
    world, setting = world_of(folder, seed), SETTINGS[name]
    predictor = setting.train(world, recipe)
    predictions = predictor.predict(sets(world).validation if setting.spurious else world.data.validation)
    return accuracy_and_nll(predictions.logits, predictions.labels)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: preference(row["validation_accuracy"], row["validation_nll"]))


def select(names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0))
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        waiting = [
            (name, recipe, [pool.submit(score, folder, name, recipe, seed) for seed in seeds])
            for name in names
            for recipe in SETTINGS[name].candidates(name)
        ]
        for name, recipe, scores in waiting:
            accuracy, nll = (statistics.mean(column) for column in zip(*(s.result() for s in scores), strict=True))
            row = {"name": name, "lr": recipe.lr, "validation_accuracy": accuracy, "validation_nll": nll}
            row |= {"risk": recipe.options["risk"]} if "risk" in recipe.options else {}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = select(options.names, options.seeds)
    for name in options.names:
        chosen, recipe = best([row for row in rows if row["name"] == name]), SETTINGS[name].recipe
        same = chosen["lr"] == recipe.lr and chosen.get("risk") == recipe.options.get("risk")
        print(f"{name}: {chosen}" + ("" if same else f"\n    but its recipe has {recipe}"))
    path = machine.RESULTS / "study_selection.json"
    if set(options.names) != set(SETTINGS) and path.exists():
        rows += [row for row in json.loads(path.read_text())["results"]["rows"] if row["name"] not in options.names]
    print(
        machine.write("study_selection", "python -m benchmarks.study_selection", {"seeds": options.seeds, "rows": rows})
    )


if __name__ == "__main__":
    main()
