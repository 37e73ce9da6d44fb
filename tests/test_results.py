"""What README says of GlyphWorld, held against the committed results of `python -m benchmarks.glyphworld`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
TABLE = json.loads((RESULTS / "glyphworld.json").read_text())["results"]
README = (RESULTS.parent.parent / "README.md").read_text()


def mean(model: str, key: str) -> float:
    return statistics.mean(run[key] for run in TABLE["summaries"][model])


@pytest.mark.parametrize("model", ["FT", "FLYP"])
def test_fine_tuning_gains_in_distribution_and_forgets_what_pre_training_knew(model):
    assert mean(model, "id_accuracy") >= mean("zero-shot", "id_accuracy") + 0.15
    assert mean(model, "font_accuracy") <= mean("zero-shot", "font_accuracy") - 0.15


def test_fine_tuning_is_calibrated_in_distribution_only():
    assert mean("FT", "ood_ece") >= mean("FT", "id_ece") + 0.10


def test_wise_ft_beats_both_its_ends_under_shift():
    for name in ("FT", "FLYP"):
        ends = max(mean("zero-shot", "ood_accuracy"), mean(name, "ood_accuracy"))
        best = statistics.mean(max(curve["ood_accuracy"]) for curve in TABLE["frontiers"][f"WiSE {name}"])
        assert best > ends


def test_carot_is_calibrated_and_remembers_better_than_flyp():
    assert mean("CaRot", "ood_ece") <= 0.8 * mean("FLYP", "ood_ece")
    assert mean("CaRot", "font_accuracy") > mean("FLYP", "font_accuracy")
    assert mean("CaRot", "ood_accuracy") > mean("FLYP", "ood_accuracy")


def test_seeds_agree_in_distribution_within_two_points():
    for runs in TABLE["summaries"].values():
        accuracies = [run["id_accuracy"] for run in runs]
        assert max(accuracies) - min(accuracies) <= 0.02


def test_recipes_are_those_chosen_on_id_validation():
    from robustft.quickstart import RECIPES

    rows = json.loads((RESULTS / "glyphworld_selection.json").read_text())["results"]["rows"]
    for name, recipe in RECIPES.items():
        own = [row for row in rows if row["method"] == name]
        assert min(own, key=lambda row: (-row["validation_accuracy"], row["validation_nll"]))["lr"] == recipe.lr


def test_readme_shows_the_committed_table():
    assert (RESULTS / "glyphworld.md").read_text() in README
