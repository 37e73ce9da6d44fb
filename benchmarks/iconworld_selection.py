"""What the image towers of IconWorld's model bear of the digits' learning rates, by ID validation data.

    python -m benchmarks.iconworld_selection               # results/iconworld_selection.json; sixty short trainings
    python -m benchmarks.iconworld_selection --epochs 3 10 # also at other lengths: does a longer run change anything?

Each method that has a factor of its own is trained with the study's seeds at each of `RATES` times its learning rate.
The rate of the highest mean accuracy on ID validation data is chosen, of equals that of the lowest mean NLL there. No
test image is looked at. `robustft.pipeline.worlds` holds what was chosen; the tests compare the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from robustft.pipeline.recipes import RECIPES, SEEDS
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import benchmark
from robustft.predictors.logits import accuracy_and_nll, preference

from . import machine

METHODS = {"FT": "FineTune", "LP-FT": "LPFT", "FLYP": "FLYP", "CaRot": "CaRot", "DRM": "DRM"}
"""As the study calls them, and as a recipe does."""
RATES = (0.01, 0.03, 0.1, 0.3)
ICONS = benchmark("icons")
EPOCHS = ICONS.recipe(RECIPES["FT"]).epochs


def score(folder: str, method: str, rate: float, seed: int, epochs: int, model: Path | None) -> dict[str, Any]:
    """A candidate's accuracy and NLL on ID validation data."""
    world = World(Path(folder) / f"{rate}-{epochs}-{seed}", seed, world="icons", log=lambda text: None)
    if model is not None:
        world.bundle = ICONS.load_clip(model)
    share = epochs / RECIPES["FT"].epochs
    world.benchmark = replace(ICONS, rates=dict.fromkeys(METHODS.values(), rate), epochs=share)
    outputs = world.predictor(method).predict(world.data.validation)
    accuracy, nll = accuracy_and_nll(outputs.logits, outputs.labels)
    row = {"method": method, "rate": rate, "seed": seed, "epochs": epochs}
    return row | {"validation_accuracy": accuracy, "validation_nll": nll}


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each method the rate of the highest mean accuracy over seeds, of equals that of the lowest mean NLL."""

    def order(method: str, rate: float) -> tuple[float, float]:
        own = [row for row in rows if (row["method"], row["rate"]) == (method, rate)]
        return preference(*(statistics.fmean(row[f"validation_{what}"] for row in own) for what in ("accuracy", "nll")))

    rates = sorted({row["rate"] for row in rows})
    return {recipe: min(rates, key=lambda rate: order(method, rate)) for method, recipe in METHODS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[EPOCHS], help="lengths of the runs (%(default)s)")
    parser.add_argument("--model", type=Path, help="a file of robustft.data.iconworld.pretrain, not the bundled one")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        waiting = [
            pool.submit(score, folder, method, rate, seed, epochs, options.model)
            for epochs, seed, rate, method in product(options.epochs, SEEDS, RATES, METHODS)
        ]
        rows = []
        for task in waiting:
            rows.append(task.result())
            print(json.dumps(rows[-1]), flush=True)
    for epochs in options.epochs:
        chosen = best([row for row in rows if row["epochs"] == epochs])
        held = "" if chosen == ICONS.rates else f"; robustft.pipeline.worlds has {ICONS.rates}"
        print(f"{epochs} epochs: {chosen} times the digits' rates{held}")
    if options.model is None:
        command = " ".join(["python -m benchmarks.iconworld_selection", *_told(options.epochs)])
        print(machine.write("iconworld_selection", command, {"rows": rows}))


def _told(epochs: Sequence[int]) -> list[str]:
    return [] if list(epochs) == [EPOCHS] else [f"--epochs {' '.join(map(str, epochs))}"]


if __name__ == "__main__":
    main()
