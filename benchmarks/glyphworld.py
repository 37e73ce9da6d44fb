"""The quickstart over several seeds: the README's table, and the choice of learning rates behind it.

    python -m benchmarks.glyphworld             # seeds 0-2: results/glyphworld.{json,md} and the README's table
    python -m benchmarks.glyphworld --select    # results/glyphworld_selection.json

A learning rate is chosen for each method by its mean accuracy on the ID validation split over the seeds, of equals by
its NLL there. No test image is looked at for it. All else in the recipes is the methods' default, or shared.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from robustft.data import glyphworld
from robustft.files import write_text
from robustft.pipeline import quickstart
from robustft.pipeline.training import Materials, train_recipe
from robustft.predictors.logits import accuracy_and_nll, preference

from . import machine

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
README = Path(__file__).parent.parent / "README.md"
COLUMNS = {
    "acc ID": "id_accuracy",
    "acc OOD": "ood_accuracy",
    "font": "font_accuracy",
    "ECE ID": "id_ece",
    "ECE OOD": "ood_ece",
    "MCM AUROC": "mcm_auroc",
    "FPR95": "mcm_fpr95",
}


def select(seeds: list[int]) -> None:
    bundle = glyphworld.load_clip()
    sets = glyphworld.sets(1)
    rows = []
    for name, recipe in quickstart.RECIPES.items():
        for lr in LEARNING_RATES:
            candidate = replace(recipe, lr=lr)
            scores = []
            for seed in seeds:
                materials = Materials.of(bundle, sets, glyphworld.TEMPLATES, seed=seed)
                method, _ = train_recipe(candidate, materials, None, progress=False)
                predictions = method.classifier().predict(sets.validation)
                scores.append(accuracy_and_nll(predictions.logits, predictions.labels))
            accuracy, nll = (statistics.mean(column) for column in zip(*scores, strict=True))
            rows.append({"method": name, "lr": lr, "validation_accuracy": accuracy, "validation_nll": nll})
            print(f"{name:6} lr {lr:<7g} ID validation accuracy {accuracy:.4f}, NLL {nll:.4f}", flush=True)
    for name, recipe in quickstart.RECIPES.items():
        own = [row for row in rows if row["method"] == name]
        best = min(own, key=lambda row: preference(row["validation_accuracy"], row["validation_nll"]))
        print(f"{name}: {best['lr']:g}" + ("" if best["lr"] == recipe.lr else f", but its recipe has {recipe.lr:g}"))
    command = f"python -m benchmarks.glyphworld --select --seeds {' '.join(map(str, seeds))}"
    print(machine.write("glyphworld_selection", command, {"seeds": seeds, "rows": rows}))


def table(seeds: list[int]) -> None:
    summaries: dict[str, list[dict[str, float]]] = {}
    shifts: dict[str, dict[str, list[float]]] = {}
    frontiers: dict[str, list[dict[str, object]]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = quickstart.quickstart(Path(folder) / "run", seed=seed, progress=False)
        for frontier in result.frontiers:
            frontiers.setdefault(frontier.name, []).append(asdict(frontier))
        for entry in result.evaluation.to_dict()["models"]:
            model = result.evaluation.models[entry["model"]]
            of_shift = {name: s.calibration.accuracy for name, s in model.shifts.items()}
            for name, value in of_shift.items():
                shifts.setdefault(entry["model"], {}).setdefault(name, []).append(value)
            summary = entry["summary"] | {"font_accuracy": of_shift["font"]}
            summaries.setdefault(entry["model"], []).append(summary)
    command = f"python -m benchmarks.glyphworld --seeds {' '.join(map(str, seeds))}"
    conventions = " ".join(result.evaluation.conventions())
    results = {"seeds": seeds, "conventions": conventions, "summaries": summaries}
    print(machine.write("glyphworld", command, results | {"shift_accuracies": shifts, "frontiers": frontiers}))
    write_table()


def write_table() -> None:
    """results/glyphworld.md and the README's table, from results/glyphworld.json."""
    results = json.loads((machine.RESULTS / "glyphworld.json").read_text())["results"]
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, runs in results["summaries"].items():
        cells = [_mean_and_spread([run[key] for run in runs]) for key in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    floor = statistics.mean(run["ood_noise_floor"] for runs in results["summaries"].values() for run in runs)
    conventions = re.sub(
        r"in brackets its noise floor.*?samples\.",
        f"its noise floor is near {100 * floor:.0f}.",
        (results["conventions"]),
    )
    seeds = ", ".join(map(str, results["seeds"]))
    text = "\n".join(lines) + f"\n\nMean ± standard deviation over fine-tuning seeds {seeds}. {conventions}\n"
    write_text(machine.RESULTS / "glyphworld.md", text)
    begin, end = "<!-- table: python -m benchmarks.glyphworld -->\n", "<!-- end of table -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    write_text(README, re.sub(pattern, lambda _: begin + text + end, README.read_text(), flags=re.DOTALL))
    print(text)


def _mean_and_spread(values: list[float]) -> str:
    return (
        f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        if len(values) > 1
        else (f"{100 * values[0]:.1f}")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--select", action="store_true", help="compare learning rates on ID validation instead")
    parser.add_argument("--table", action="store_true", help="only write the table again, from the results")
    options = parser.parse_args()
    if options.table:
        write_table()
    else:
        (select if options.select else table)(options.seeds)


if __name__ == "__main__":
    main()
