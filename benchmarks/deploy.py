"""A model as one graph, by every form and in every precision: by how much it differs, and its size.

    python -m benchmarks.deploy           # writes results/deploy.json and the table results/deploy.md
    python -m benchmarks.deploy --table   # writes the table of that file

Each architecture is small (`small_architectures`), with random weights and three classes: numbers tell that a form has
its operations, and what float16 does to them, not how large a model of yours becomes. Graphs run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from benchmarks import machine
from benchmarks.architectures import small
from robustft.detection import Detector
from robustft.files import write_text
from robustft.machine import Bits, Graph
from robustft.methods import zero_shot_classifier
from robustft.pipeline.deploying import TOLERANCES, write_graph
from robustft.pipeline.serving import Pipeline

ARCHITECTURES = {"ViT-B-16": "ViT", "RN50": "ResNet", "convnext_base": "ConvNeXt", "ViT-B-16-SigLIP2": "SigLIP"}
TABLE = machine.RESULTS / "deploy.md"


def pipeline_of(name: str, folder: Path, score: str = "mcm") -> tuple[Pipeline, Tensor]:
    """A small zero-shot model with a detector, and six images."""
    model, _, data, prompts = small(name, folder)
    classifier = zero_shot_classifier(model, **prompts)
    labelled = data["image"], data["label"]
    detector = Detector(score, tpr=0.5).fit(classifier, labelled, validation=labelled)
    return Pipeline(classifier, detector, lambda image: image), data["image"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """One of each architecture, form and precision."""
    found = []
    for name, kind in ARCHITECTURES.items():
        pipeline, images = pipeline_of(name, folder)
        for form in get_args(Graph):
            for bits in get_args(Bits):
                place = folder / f"{name}-{form}-{bits}"
                place.mkdir()
                difference = write_graph(pipeline, place, form, bits, images)
                assert difference <= TOLERANCES[bits], (name, form, bits, difference)
                size = sum(path.stat().st_size for path in place.iterdir())
                row = {"model": kind, "form": form, "precision": bits, "difference": difference}
                found.append(row | {"bytes": size})
                print(found[-1], flush=True)
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The differences, a line a model and precision, a column a form."""
    forms = get_args(Graph)
    lines = [f"| model | precision | {' | '.join(forms)} |", "|---|---|" + "---:|" * len(forms)]
    found = {(row["model"], row["precision"], row["form"]): row["difference"] for row in results}
    for model in ARCHITECTURES.values():
        for bits in get_args(Bits):
            cells = [f"{found[model, bits, form]:.1g}" for form in forms]
            lines.append(f"| {model} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", action="store_true", help="write the table of the last run")
    if not parser.parse_args().table:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about each other
            machine.write("deploy", "python -m benchmarks.deploy", rows(Path(folder)))
    write_text(TABLE, table(json.loads((machine.RESULTS / "deploy.json").read_text())["results"]))


if __name__ == "__main__":
    main()
