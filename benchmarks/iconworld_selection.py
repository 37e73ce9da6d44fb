"""What the image towers of IconWorld's model bear of the digits' learning rates, by ID validation data.

    python -m benchmarks.iconworld_selection               # results/iconworld_selection.json; 150 short trainings
    python -m benchmarks.iconworld_selection --resume      # those of them that the file has not
    python -m benchmarks.iconworld_selection --epochs 3 10 # also at other lengths: does a longer run change anything?

Two tasks: the classes, and the classes in frames whose colours mislead, which the model does not know. Each method that
has a factor of its own is trained with the study's seeds at several factors of its learning rate. The one of the
highest mean accuracy on the task's ID validation data is chosen, of equals that of the lowest mean NLL there. No test
image is looked at. `robustft.pipeline.worlds` holds what was chosen; the tests compare the two.
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

from robustft.methods import CoreProxy
from robustft.pipeline.recipes import RECIPES, SEEDS
from robustft.pipeline.study.drm import WORST_CASE, Spurious
from robustft.pipeline.study.recipes import SPURIOUS
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import benchmark, rate_of
from robustft.predictors.logits import accuracy_and_nll, preference

from . import machine

CLASSES, FRAMES = "classes", "frames"
METHODS: Mapping[str, Mapping[str, str]] = {
    CLASSES: {"FT": "FineTune", "LP-FT": "LPFT", "FLYP": "FLYP", "CaRot": "CaRot", "DRM": "DRM"},
    FRAMES: {name: rate_of(SPURIOUS[name]) for name in ("FT", *WORST_CASE, "FLYP", "DRM")},
}
"""Of each task, as the study calls them, and as their factors are called."""
RATES = {CLASSES: (0.01, 0.03, 0.1, 0.3), FRAMES: (0.03, 0.1, 0.3, 1.0, 3.0)}
Row = dict[str, Any]
ICONS = benchmark("icons")
HELD = {CLASSES: ICONS.rates, FRAMES: ICONS.misled_rates}
EPOCHS = ICONS.recipe(RECIPES["FT"]).epochs


def score(folder: str, task: str, method: str, rate: float, seed: int, epochs: int, model: Path | None) -> Row:
    """A candidate's accuracy and NLL on the task's ID validation data."""
    world = World(Path(folder) / f"{rate}-{epochs}-{seed}", seed, world="icons", log=lambda text: None)
    if model is not None:
        world.bundle = ICONS.load_clip(model)
    share, rates = epochs / RECIPES["FT"].epochs, dict.fromkeys(METHODS[task].values(), rate)
    world.benchmark = replace(ICONS, rates=rates, misled_rates=rates, epochs=share)
    if task == CLASSES:
        predictor, validation = world.predictor(method), world.data.validation
    else:
        sets = Spurious(world)
        drm = method == "DRM"
        predictor = sets.weighted(CoreProxy(), 1.0) if drm else sets.trained(SPURIOUS[method])
        validation = sets.validation
    outputs = predictor.predict(validation)
    accuracy, nll = accuracy_and_nll(outputs.logits, outputs.labels)
    row = {"task": task, "method": method, "rate": rate, "seed": seed, "epochs": epochs}
    return row | {"validation_accuracy": accuracy, "validation_nll": nll}


def best(rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, float]:
    """For each method of a task the rate of the highest mean accuracy over seeds; of equals that of the lowest mean
    NLL."""

    def order(method: str, rate: float) -> tuple[float, float]:
        own = [row for row in rows if (row["task"], row["method"], row["rate"]) == (task, method, rate)]
        return preference(*(statistics.fmean(row[f"validation_{what}"] for row in own) for what in ("accuracy", "nll")))

    return {name: min(RATES[task], key=lambda rate: order(method, rate)) for method, name in METHODS[task].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[EPOCHS], help="lengths of the runs (%(default)s)")
    rows_of = parser.add_mutually_exclusive_group()
    rows_of.add_argument("--resume", action="store_true", help="keep what the file of results has")
    rows_of.add_argument("--model", type=Path, help="a file of robustft.data.iconworld.pretrain, not the bundled one")
    options = parser.parse_args()
    path = machine.RESULTS / "iconworld_selection.json"
    rows = json.loads(path.read_text())["results"]["rows"] if options.resume else []
    known = {tuple(row[name] for name in ("epochs", "seed", "task", "rate", "method")) for row in rows}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        waiting = [
            pool.submit(score, folder, task, method, rate, seed, epochs, options.model)
            for epochs, seed, task in product(options.epochs, SEEDS, METHODS)
            for rate, method in product(RATES[task], METHODS[task])
            if (epochs, seed, task, rate, method) not in known
        ]
        for task in waiting:
            rows.append(task.result())
            print(json.dumps(rows[-1]), flush=True)
    for epochs, task in product(options.epochs, METHODS):
        chosen = best([row for row in rows if row["epochs"] == epochs], task)
        held = "" if chosen == HELD[task] else f"; robustft.pipeline.worlds has {HELD[task]}"
        print(f"{task}, {epochs} epochs: {chosen} times the digits' rates{held}")
    if options.model is None:
        command = " ".join(["python -m benchmarks.iconworld_selection", *_told(options.epochs)])
        print(machine.write("iconworld_selection", command, {"rows": rows}))


def _told(epochs: Sequence[int]) -> list[str]:
    return [] if list(epochs) == [EPOCHS] else [f"--epochs {' '.join(map(str, epochs))}"]


if __name__ == "__main__":
    main()
