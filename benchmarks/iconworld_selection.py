"""What the image towers of IconWorld's model bear of the digits' learning rates, by ID validation data.

    python -m benchmarks.iconworld_selection               # results/iconworld_selection.json; eight short trainings
    python -m benchmarks.iconworld_selection --epochs 4 10 # also at other lengths: does a longer run change anything?

FT and FLYP are trained for one seed at each of `RATES` times their learning rates. The rate of the highest mean
accuracy on ID validation data is chosen, of equals that of the lowest mean NLL there. No test image is looked at.
`robustft.pipeline.worlds` holds what was chosen; the tests compare the two.
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from robustft.pipeline.recipes import RECIPES
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import benchmark
from robustft.predictors.logits import accuracy_and_nll, preference

from . import machine

METHODS = ("FT", "FLYP")
RATES = (0.03, 0.1, 0.3, 1.0)
ICONS = benchmark("icons")
EPOCHS = ICONS.recipe(RECIPES["FT"]).epochs
SEED = 0


def score(folder: str, method: str, rate: float, epochs: int, model: Path | None) -> dict[str, Any]:
    """A candidate's accuracy and NLL on ID validation data."""
    world = World(Path(folder) / f"{method}-{rate}-{epochs}", SEED, world="icons", log=lambda text: None)
    if model is not None:
        world.bundle = ICONS.load_clip(model)
    recipe = RECIPES[method]
    world.benchmark = replace(ICONS, rate=rate, epochs=epochs / recipe.epochs)
    predictor = world.classifier(method)
    outputs = predictor.predict(world.data.validation)
    accuracy, nll = accuracy_and_nll(outputs.logits, outputs.labels)
    row = {"method": method, "rate": rate, "epochs": epochs}
    return row | {"validation_accuracy": accuracy, "validation_nll": nll}


def best(rows: Sequence[Mapping[str, Any]]) -> float:
    """The rate of the highest mean accuracy over the methods, of equals that of the lowest mean NLL."""

    def order(rate: float) -> tuple[float, float]:
        own = [row for row in rows if row["rate"] == rate]
        return preference(*(statistics.fmean(row[f"validation_{what}"] for row in own) for what in ("accuracy", "nll")))

    return min(sorted({row["rate"] for row in rows}), key=order)


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
            pool.submit(score, folder, method, rate, epochs, options.model)
            for epochs in options.epochs
            for rate in RATES
            for method in METHODS
        ]
        rows = []
        for task in waiting:
            rows.append(task.result())
            print(json.dumps(rows[-1]), flush=True)
    for epochs in options.epochs:
        chosen = best([row for row in rows if row["epochs"] == epochs])
        held = "" if chosen == ICONS.rate else f"; robustft.pipeline.worlds has {ICONS.rate}"
        print(f"{epochs} epochs: {chosen} times the digits' rates{held}")
    if options.model is None:
        command = " ".join(["python -m benchmarks.iconworld_selection", *_told(options.epochs)])
        print(machine.write("iconworld_selection", command, {"seed": SEED, "rows": rows}))


def _told(epochs: Sequence[int]) -> list[str]:
    return [] if list(epochs) == [EPOCHS] else [f"--epochs {' '.join(map(str, epochs))}"]


if __name__ == "__main__":
    main()
