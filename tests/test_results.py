"""What README and docs say of the bundled benchmarks, held against the committed results of its measurements."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from test_docs import site

from robustft.files import json_text

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
    from robustft.pipeline.quickstart import RECIPES

    rows = json.loads((RESULTS / "glyphworld_selection.json").read_text())["results"]["rows"]
    for name, recipe in RECIPES.items():
        own = [row for row in rows if row["method"] == name]
        assert min(own, key=lambda row: (-row["validation_accuracy"], row["validation_nll"]))["lr"] == recipe.lr


def test_the_studys_recipes_are_those_chosen_on_id_validation():
    from benchmarks.study_selection import SETTINGS, best

    rows = json.loads((RESULTS / "study_selection.json").read_text())["results"]["rows"]
    for name, setting in SETTINGS.items():
        own = [row for row in rows if row["name"] == name]
        assert len(own) == len(setting.candidates(name))
        chosen = best(own)
        assert (chosen["lr"], chosen.get("risk")) == (setting.recipe.lr, setting.recipe.options.get("risk")), name


def test_readme_shows_the_committed_table():
    assert (RESULTS / "glyphworld.md").read_text() in README


SITE = site()


def verdicts(world: str) -> dict[str, str]:
    sections = SITE.study_results(world)["sections"].values()
    return {c["claim"]: c["verdict"] for section in sections for c in section["claims"]}


SOUP = "soup of zero-shot, LP-FT, CaRot + CMP and DRM"


@pytest.mark.parametrize(
    "verdict, claims",
    [
        (
            "appears",
            [
                *(f"CaRot is more accurate under shift than {name}" for name in ("FLYP", "FT", "WiSE FLYP")),
                *(f"CaRot's ECE under shift is lower than {name}'s" for name in ("FLYP", "FT", "WiSE FLYP")),
                "A lagged teacher beats a frozen one under shift",
                "A teacher that moves every step is worse under shift",
                *(f"{name} + VRF is more accurate under shift than {name}" for name in ("FT", "FLYP", "CaRot")),
                "FT: VRF's frontier is above that of OSE with temperatures",
                *(
                    f"DRM, {setting} on the label, lambda 1, is more accurate than FLYP there"
                    for setting in ("affinity, rest spread, 0%", "affinity, rest spread, 50%", "soft, 0%", "soft, 50%")
                ),
                *(
                    f"{name} is more accurate than FT on conflicting backgrounds"
                    for name in ("group DRO", "worst group")
                ),
                "The released ratio lowers accuracy",
                "A temperature lowers zero-shot's ECE under shift",
                "A temperature lowers CaRot's ECE in distribution",
                "CaRot as it is has a lower ECE under shift than FT with a temperature",
                "Zero-shot, NegLabel beats MCM against other letters that it was not given",
                *(f"{SOUP}: beats every single method in {column}" for column in ("acc OOD", "ECE OOD")),
            ],
        ),
        (
            "does not appear",
            [
                "CaRot is more accurate under shift than LP-FT",
                "By MCM, LoCoOp is better than CoOp against textures",
                "The mixture of both heads beats the default head on conflicting backgrounds",
                "A temperature lowers FT's ECE in distribution",
                *(f"{SOUP}: beats every single method in {column}" for column in ("acc ID", "AUROC, k-NN")),
            ],
        ),
        (
            "the opposite appears",
            [
                *(f"{name}: VRF's frontier is above WSE's" for name in ("FT", "FLYP", "CaRot", "LP")),
                "LP + VRF is more accurate under shift than LP",
                "DRM, as ID validation chooses it, is more accurate than FLYP on conflicting backgrounds",
                "A temperature lowers CaRot's ECE under shift",
                "Zero-shot's ECE under shift is still lower than CaRot's",
            ],
        ),
    ],
)
def test_the_study_of_digits_finds_what_its_page_says(verdict, claims):
    found = verdicts("digits")
    assert {claim: found[claim] for claim in claims} == dict.fromkeys(claims, verdict)


ON_MODELS = ("Zero-shot", "After CaRot")


@pytest.mark.parametrize(
    "verdict, claims",
    [
        (
            "appears",
            [
                "CaRot is more accurate under shift than LP-FT",
                "CaRot's ECE under shift is lower than FLYP's",
                "Distillation alone lowers ECE under shift",
                *(f"Model Stock of two FT is more accurate under shift than {name}" for name in ("FT", "WiSE FT")),
                *(f"{name} + VRF is more accurate under shift than {name}" for name in ("FT", "LP")),
                *(f"{name} is more accurate than FT on conflicting frames" for name in ("group DRO", "worst group")),
                *(f"CMP lowers {name}'s ECE" for name in ("linear probe", "Tip-Adapter-F")),
                "MaPLe is less accurate on new classes than zero-shot",
                "A temperature of base classes lowers CoOp's ECE on new classes",
                "DAC lowers CoOp's ECE on new classes",
                "A temperature lowers zero-shot's ECE in distribution",
                *(f"{when}, NegLabel beats MCM against far unknowns" for when in ON_MODELS),
                *(f"{when}, AdaNeg beats NegLabel against {w} unknowns" for when in ON_MODELS for w in ("near", "far")),
            ],
        ),
        (
            "does not appear",
            [
                "CaRot is more accurate under shift than FLYP",
                "A lagged teacher beats a frozen one under shift",
                "TRACER's further perspectives add accuracy under shift to that",
                *(f"{name} is more accurate under shift than FT" for name in ("Lipsum-FT", "CAR-FT", "LiNeS FT")),
                *(
                    f"{name} is more accurate on base classes than zero-shot"
                    for name in ("CoOp", "KgCoOp", "CoCoOp", "MaPLe")
                ),
            ],
        ),
        (
            "the opposite appears",
            [
                "StarFT is more accurate under shift than FLYP",
                "DRM, as ID validation chooses it, is more accurate than FLYP on conflicting frames",
                *(f"CMP lowers {name}'s ECE" for name in ("CoOp", "KgCoOp", "ProDA", "LoCoOp")),
                "A temperature lowers CaRot's ECE in distribution",
                *(
                    f"{when}, MCM beats energy against {what}"
                    for when in (*ON_MODELS, "After FT")
                    for what in ("held-out kinds", "symbols")
                ),
                *(f"{when}, NegLabel beats MCM against near unknowns" for when in ON_MODELS),
                *(f"{when}, AdaNeg beats NegLabel against near unknowns, full-spectrum" for when in ON_MODELS),
            ],
        ),
    ],
)
def test_the_study_of_icons_finds_what_its_page_says(verdict, claims):
    found = verdicts("icons")
    assert {claim: found[claim] for claim in claims} == dict.fromkeys(claims, verdict)


@pytest.mark.parametrize("world", SITE.STUDIES)
def test_claims_read_off_the_committed_tables_have_the_committed_verdicts(world):
    assert SITE.study_results(world)["world"] == world
    page = SITE.study_tables(world)
    assert [c for c, verdict in verdicts(world).items() if f"| {c} | {verdict} |" not in page] == []


@pytest.mark.parametrize("task", ["classes", "frames"])
def test_the_rates_of_icons_are_those_chosen_on_id_validation(task):
    from benchmarks.iconworld_selection import EPOCHS, HELD, METHODS, RATES, SEEDS, best

    held = json.loads((RESULTS / "iconworld_selection.json").read_text())["results"]["rows"]
    rows = [row for row in held if (row["task"], row["epochs"]) == (task, EPOCHS)]
    assert len(rows) == len(METHODS[task]) * len(RATES[task]) * len(SEEDS) and best(rows, task) == HELD[task]


def test_the_recipes_table_is_the_studys():
    docs = RESULTS.parent.parent / "docs"
    study = SITE.study_tables("digits")
    compositions = study[study.index("**single methods**") :]
    rows = [line.replace("**", "") for line in (docs / "recipe.md").read_text().splitlines() if line.startswith("|")]
    rows = rows[2:]
    assert len(rows) == 6
    for row in rows:
        assert row.replace("the mean", SOUP) in compositions


@pytest.mark.parametrize("world", SITE.STUDIES)
def test_a_study_shows_the_command_that_makes_it(world):
    from robustft.pipeline import study

    command = study._command(world, False, study.SEEDS, study.sections_of(world))
    assert SITE.study_results(world)["command"] == command and f"`{command}`" in SITE.study_tables(world)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_hold_one_row_a_line(path):
    assert json_text(json.loads(path.read_text())) + "\n" == path.read_text()
