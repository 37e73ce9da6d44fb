"""What README and docs say of the bundled benchmarks, held against the committed results of its measurements."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from test_docs import site

from robustft.files import json_text
from robustft.pipeline.recipes import WORLDS

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


def test_the_page_of_training_says_what_adamw_saves():
    row = json.loads((RESULTS / "adamw.json").read_text())["results"]["FLYP ViT-B-16-SigLIP2 batch 4, 4 classes"]
    page = " ".join((RESULTS.parent.parent / "docs" / "training.md").read_text().split())
    ours, torchs = (f"{row['bytes'][whose] / 1e9:.1f}" for whose in ("robustft", "torch"))
    assert f"take {ours} GB in place of {torchs}, and a step of four images {1 / row['ratio']:.2f} of the time" in page


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
                "The beta teacher makes CaRot more accurate under shift",
                "The beta teacher lowers CaRot's ECE under shift",
                "TRACER's further perspectives add accuracy under shift to that",
                "Lipsum-FT is more accurate under shift than FT",
                "StarFT is more accurate under shift than FLYP",
                *(f"Model Stock of two FT is more accurate under shift than {name}" for name in ("FT", "WiSE FT")),
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
                "CAR-FT is more accurate under shift than FT",
                *(f"LiNeS FT is more accurate under shift than {name}" for name in ("FT", "WiSE FT")),
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


APART = ("acc ID and acc OOD", "acc OOD and ECE OOD")
TOGETHER = ("acc ID and AUROC, k-NN", "acc ID and ECE OOD", "acc OOD and AUROC, k-NN", "AUROC, k-NN and ECE OOD")
ON_MODELS = ("Zero-shot", "After CaRot")


@pytest.mark.parametrize(
    "verdict, claims",
    [
        (
            "appears",
            [
                *(f"CaRot is more accurate under shift than {name}" for name in ("FT", "LP-FT")),
                *(f"CaRot's ECE under shift is lower than {name}'s" for name in ("FLYP", "LP-FT", "WiSE FLYP")),
                "Distillation alone lowers ECE under shift",
                *(f"Model Stock of two FT is more accurate under shift than {name}" for name in ("FT", "WiSE FT")),
                *(f"{name} + VRF is more accurate under shift than {name}" for name in ("FT", "LP")),
                *(
                    f"{name} is more accurate than FT on conflicting frames"
                    for name in ("group DRO", "worst group", "CVaR")
                ),
                *(
                    f"DRM, {setting} on the label, lambda 1, is more accurate than FLYP there"
                    for setting in ("affinity, rest spread, 0%", "affinity, rest spread, 50%", "soft, 0%", "soft, 50%")
                ),
                "DRM's ECE on conflicting frames is lower than FLYP's",
                "CAR-FT is more accurate under shift than FT",
                *(
                    f"CMP lowers {name}'s ECE{where}"
                    for name in ("linear probe", "Tip-Adapter-F")
                    for where in ("", " under shift")
                ),
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
                "The beta teacher makes CaRot more accurate under shift",
                "TRACER's further perspectives add accuracy under shift to that",
                *(f"{name} is more accurate under shift than FT" for name in ("Lipsum-FT", "LiNeS FT")),
                "CaRot's ECE under shift is lower than FT's",
                "DRM, as ID validation chooses it, is more accurate than FLYP on conflicting frames",
                *(
                    f"DRM, affinity, rest dropped, {mass} on the label, lambda 1, is more accurate than FLYP there"
                    for mass in ("0%", "50%")
                ),
                *(f"ZS-Norm lowers CoOp's ECE on {part} classes" for part in ("base", "new")),
                "CoOp + ZS-Norm has a higher harmonic mean than CoOp",
                "The zero-shot range lowers CoOp's ECE on new classes",
                "The composition that ID validation chooses beats every single method in acc OOD",
                *(f"{one} fight: of all models, those better at one are worse at the other" for one in APART),
                *(
                    f"{name} is more accurate on base classes than zero-shot"
                    for name in ("CoOp", "KgCoOp", "CoCoOp", "MaPLe")
                ),
                *(f"{name} is less accurate on new classes than zero-shot" for name in ("CoOp", "KgCoOp", "CoCoOp")),
                *(f"{name} + VRF is more accurate under shift than {name}" for name in ("FLYP", "CaRot")),
                "A temperature lowers FT's ECE under shift",
            ],
        ),
        (
            "the opposite appears",
            [
                "StarFT is more accurate under shift than FLYP",
                "A teacher that moves every step is worse under shift",
                "Zero-shot's ECE under shift is still lower than CaRot's",
                *(f"Near the failure set {name} gains more over zero-shot than far from it" for name in ("FT", "LP")),
                "FT: VRF's frontier is above that of OSE with temperatures",
                "DRM, as ID validation chooses it, is more accurate than FT on conflicting frames",
                "DAC lowers KgCoOp's ECE on new classes",
                *(
                    f"The composition that ID validation chooses beats every single method in {column}"
                    for column in ("acc ID", "ECE OOD", "AUROC, k-NN")
                ),
                *(f"{one} fight: of all models, those better at one are worse at the other" for one in TOGETHER),
                *(
                    f"CMP lowers {name}'s ECE{where}"
                    for name in ("CoOp", "KgCoOp", "ProDA", "LoCoOp")
                    for where in ("", " under shift")
                ),
                *(f"A temperature lowers {name}'s ECE in distribution" for name in ("FT", "CaRot")),
                *(f"A temperature lowers {name}'s ECE under shift" for name in ("zero-shot", "CaRot", "CoOp, 8 shots")),
                *(
                    f"{when}, MCM beats energy against {what}"
                    for when in (*ON_MODELS, "After FT")
                    for what in ("held-out kinds", "symbols")
                ),
                *(f"{when}, NegLabel beats MCM against near unknowns" for when in ON_MODELS),
                *(
                    f"{when}, NegLabel beats MCM against {what} that it was not given"
                    for when in ON_MODELS
                    for what in ("other held-out kinds", "symbols")
                ),
                "By MCM, LoCoOp is better than CoOp against held-out kinds",
                *(f"{SOUP}: beats every single method in {c}" for c in ("acc ID", "acc OOD", "ECE OOD", "AUROC, k-NN")),
                *(f"{when}, AdaNeg beats NegLabel against near unknowns, full-spectrum" for when in ON_MODELS),
            ],
        ),
    ],
)
def test_the_study_of_icons_finds_what_its_page_says(verdict, claims):
    found = verdicts("icons")
    assert {claim: found[claim] for claim in claims} == dict.fromkeys(claims, verdict)


def average(world: str, section: str, table: str, row: str, column: str) -> float:
    seeds = SITE.study_results(world)["sections"][section]["seeds"]
    return statistics.mean(seed["tables"][table][row][column] for seed in seeds)


def test_on_digits_what_came_since_carot_gains_what_the_studys_page_says():
    margins = {
        "Lipsum-FT is more accurate under shift than FT": "6.6",
        "StarFT is more accurate under shift than FLYP": "10.9",
        "Model Stock of two FT is more accurate under shift than FT": "7.6",
        "Model Stock of two FT is more accurate under shift than WiSE FT": "6.8",
    }
    found = {c["claim"]: c["margins"] for c in SITE.study_results("digits")["sections"]["field"]["claims"]}
    assert {claim: f"{statistics.mean(found[claim]):.1f}" for claim in margins} == margins

    def points(row: str, column: str) -> float:
        return average("digits", "field", "TRACER's parts", row, column)

    tracer = "+ all perspectives (TRACER)"
    assert [f"{points(row, 'acc OOD'):.1f}" for row in (tracer, "CaRot")] == ["87.2", "84.3"]
    assert f"{points('CaRot', 'acc ID') - points(tracer, 'acc ID'):.1f}" == "0.8"
    soup = [average("digits", "compositions", "compositions", SOUP, column) for column in ("acc OOD", "ECE OOD")]
    assert f"{soup[0] - points(tracer, 'acc OOD'):.1f}" == "1.6"
    assert f"{soup[1]:.1f}" == f"{points(tracer, 'ECE OOD'):.1f}" == "5.1"
    assert f"| {tracer} | 98.8 ± 0.2 | 87.2 ± 0.4 | 2.6 ± 0.2 | 5.1 ± 0.1 |" in SITE.study_tables("digits")


def test_on_icons_no_ratio_of_accuracies_falls_for_all_and_no_frontier_of_vrfs_is_above_another():
    found = {claim: verdict for claim, verdict in verdicts("icons").items() if "VRF's frontier" in claim}
    assert len(found) == 8 and "appears" not in found.values() and "leans that way" not in found.values()
    near = [verdict for claim, verdict in verdicts("icons").items() if claim.startswith("Near the failure set")]
    assert len(near) == 4 and "appears" not in near


def test_on_icons_methods_gain_what_the_studys_page_says():
    def points(column: str, row: str = "zero-shot") -> float:
        return average("icons", "carot", "methods", row, column)

    def gain(column: str, row: str) -> float:
        return points(column, row) - points(column)

    single = ("FT", "FLYP", "CaRot", "LP-FT", "LP")
    assert (round(points("acc ID")), round(points("acc OOD"))) == (46, 49)
    assert f"{gain('acc ID', 'FT'):.1f}" == "4.6" and -0.5 < gain("acc OOD", "FT") < 0
    assert max(single, key=lambda row: points("AUROC", row)) == "FT" == max(single, key=lambda r: points("acc ID", r))
    for row in ("FLYP", "CaRot"):
        assert all(0.5 <= gain(column, row) <= 0.8 for column in ("acc ID", "acc OOD"))
    assert all(round(gain("acc OOD", row)) == -13 for row in ("LP", "LP-FT"))
    best = [average("icons", "compositions", "compositions", "CaRot + CMP", column) for column in ("acc OOD", "acc ID")]
    assert [f"{value:.1f}" for value in best] == ["49.6", "49.2"]


def test_on_icons_what_is_gained_is_gained_on_studios_that_the_model_has_not_seen():
    def gain(row: str, column: str) -> float:
        known = average("icons", "carot", "accuracy by shift", "zero-shot", column)
        return average("icons", "carot", "accuracy by shift", row, column) - known

    gained = {row: f"{gain(row, 'mean, unseen'):.1f} {-gain(row, 'mean, seen'):.1f}" for row in ("FT", "CaRot", "FLYP")}
    assert gained == {"FT": "1.6 1.9", "CaRot": "1.7 0.5", "FLYP": "2.5 0.9"}
    seen, unseen, known = (
        average("icons", "carot", table, "zero-shot", column)
        for table, column in (
            ("accuracy by shift", "mean, seen"),
            ("accuracy by shift", "mean, unseen"),
            ("methods", "acc ID"),
        )
    )
    assert (round(seen), round(unseen), round(known)) == (60, 37, 46)


def test_on_icons_energy_is_ahead_and_what_came_since_carot_detects_as_what_it_is_made_of():
    def points(score: str, row: str, what: str) -> float:
        return average("icons", "detection", f"near, far and full-spectrum: {score}", row, f"AUROC {what}")

    for row in ("zero-shot", "FT", "FLYP", "CaRot"):
        assert 14 <= points("energy", row, "far") - points("MCM", row, "far") < 18.5
        for score in ("MCM", "NegLabel", "CSP"):
            assert all(points("energy", row, what) > points(score, row, what) for what in ("near", "far"))
    assert points("energy", "LP-FT", "far") < 50
    made_of = {"Lipsum-FT": "FT", "CAR-FT": "FT", "Model Stock of two FT": "FT", "StarFT": "FLYP", "TRACER": "CaRot"}
    for row, base in made_of.items():
        assert all(abs(points("energy", row, what) - points("energy", base, what)) < 1 for what in ("near", "far"))


def test_in_misleading_frames_drm_falls_as_far_as_flyp_and_further_than_ft():
    def points(row: str, column: str = "conflicting") -> float:
        return average("icons", "drm", "aligned and conflicting frames", row, column)

    assert all(points(row, "aligned") > 50 for row in ("FT", "FLYP"))
    assert [round(points(row)) for row in ("FT", "FLYP", "DRM, affinity")] == [16, 5, 6]
    assert all(28 < points(row) < 31 for row in ("group DRO", "worst group"))
    assert [round(points("CVaR", column)) for column in ("conflicting", "aligned")] == [21, 23]
    spread = [c for c in SITE.study_results("icons")["sections"]["drm"]["claims"] if c["verdict"] == "appears"]
    ahead = [statistics.mean(c["margins"]) for c in spread if "lambda 1, is more accurate than FLYP" in c["claim"]]
    assert len(ahead) == 4 and all(1.5 < margin < 5.5 for margin in ahead)


def test_on_icons_negative_texts_are_ahead_of_mcm_against_far_unknowns_and_behind_it_against_near_ones():
    def lead(name: str, row: str, what: str) -> float:
        with_texts, mcm = (
            average("icons", "detection", f"near, far and full-spectrum: {score}", row, f"AUROC {what}")
            for score in (name, "MCM")
        )
        return with_texts - mcm

    rows = ("zero-shot", "FT", "FLYP", "CaRot", "DRM", "CoOp", "LoCoOp")
    for name in ("NegLabel", "CSP"):
        assert all(7 < lead(name, row, "far") < 13.5 and -5.5 < lead(name, row, "near") < -3 for row in rows)
        assert lead(name, "LP-FT", "far") < 0 and lead(name, "LP-FT", "near") < 0


def test_the_mean_of_four_models_is_behind_on_icons_by_what_the_recipe_says():
    columns = {"acc ID": 2.8, "acc OOD": 1.7, "ECE OOD": 0.5, "AUROC, k-NN": 2.5}
    claims = {c["claim"]: c["margins"] for c in SITE.study_results("icons")["sections"]["compositions"]["claims"]}
    for column, behind in columns.items():
        margin = statistics.mean(claims[f"{SOUP}: beats every single method in {column}"])
        assert f"{-margin:.1f}" == str(behind)
    zero_shot, *members = (
        average("icons", "compositions", "single methods", row, "acc OOD") for row in ("zero-shot", "LP-FT", "DRM")
    )
    assert all(member < zero_shot for member in members)


@pytest.mark.parametrize("world", WORLDS)
def test_the_studys_page_says_how_many_claims_are_decided(world):
    found = list(verdicts(world).values())
    decided = sum(verdict in ("appears", "the opposite appears") for verdict in found)
    command = SITE.study_results(world)["command"]
    page = (RESULTS.parent.parent / "docs" / "study.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{command}` |")]
    assert line.endswith(f" | {decided} of {len(found)} |")


@pytest.mark.parametrize("world", WORLDS)
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


@pytest.mark.parametrize("world", WORLDS)
def test_a_study_shows_the_command_that_makes_it(world):
    from robustft.pipeline import study

    command = study._command(world, False, study.SEEDS, study.sections_of(world))
    assert tuple(SITE.study_results(world)["sections"]) == study.sections_of(world)
    assert SITE.study_results(world)["command"] == command and f"`{command}`" in SITE.study_tables(world)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_hold_one_row_a_line(path):
    assert json_text(json.loads(path.read_text())) + "\n" == path.read_text()
