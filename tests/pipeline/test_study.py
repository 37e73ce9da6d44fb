"""The study: verdicts, what a killed run keeps, and its two pages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robustft.cli import main
from robustft.clip import Bundle
from robustft.clip.outputs import Outputs
from robustft.data import Data, ImageDataset
from robustft.data.small_clip import words
from robustft.detection.detector import Detector
from robustft.evaluation import Suite
from robustft.methods import CVaR, OutputEnsemble, WiSEFT
from robustft.pipeline import study
from robustft.pipeline.quickstart import RECIPES
from robustft.pipeline.study import base_to_new, compositions, detection, drm, field, vrf
from robustft.pipeline.study.calibration import NONE, TEMPERATURE, calibrated
from robustft.pipeline.study.findings import (
    Claim,
    Measured,
    Plot,
    Section,
    find,
    higher,
    joined,
    lower,
    spread,
    verdict,
)
from robustft.pipeline.study.recipes import HOSTS, SPURIOUS
from robustft.pipeline.study.world import World
from robustft.pipeline.training import built_options
from robustft.pipeline.worlds import benchmark


@pytest.mark.parametrize(
    "margins, expected",
    [
        ((1.0, 2.0, 1.5), "appears"),
        ((0.1, 0.2, 9.0), "leans that way"),
        ((5.0,), "leans that way"),
        ((1.0, -0.1, 1.0), "does not appear"),
        ((0.0, 0.0, 0.0), "does not appear"),
        ((-1.0, -2.0, -1.5), "the opposite appears"),
        ((-0.1, -0.2, -9.0), "leans the other way"),
    ],
)
def test_a_verdict_needs_seeds_that_agree(margins, expected):
    assert verdict(margins) == expected


def test_cells_are_means_and_spreads_of_the_seeds_that_have_them():
    seeds = [Measured({"t": {"b": {"x": v}, "a": {"y": 2.0, "x": -v}}}, {}) for v in (1.0, 3.0)]
    assert joined(seeds, "t") == (("", "x", "y"), ("b", "2.0 ± 1.4", "–"), ("a", "-2.0 ± 1.4", "2.0 ± 0.0"))
    seeds[1].tables["t"]["c"] = seeds[1].tables["t"].pop("b")
    assert joined(seeds, "t")[1:] == (("b", "1.0", "–"), ("a", "-2.0 ± 1.4", "2.0 ± 0.0"), ("c", "3.0", "–"))
    assert spread([0.125], 3) == "0.125"


def measured(world) -> Measured:
    world.log(f"measured {world.seed}")
    table = {"ours": {"acc": 80.0 + world.seed, "ECE": 5.0}, "theirs": {"acc": 70.0, "ECE": 4.0}}
    return Measured({"a <table>": table}, {"curve": {"ours": ([0.0, 1.0], [1.0, 2.0 + world.seed])}})


TOY = Section(
    name="toy",
    title="A toy",
    question="Is it?",
    measure=measured,
    claims=(
        Claim("ours is more accurate", higher("a <table>", "acc", "ours", "theirs")),
        Claim("ours is better calibrated", lower("a <table>", "ECE", "ours", "theirs")),
    ),
    plots=(Plot("curve", "A curve", "x", "y", "What it shows."),),
    notes={"a <table>": "A note."},
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(study, "SECTIONS", {"toy": TOY})


def test_margins_follow_their_direction():
    seeds = [measured(SimpleNamespace(seed=seed, log=lambda text: None)) for seed in (0, 1)]
    assert [find(claim, seeds).margins for claim in TOY.claims] == [(10.0, 11.0), (-1.0, -1.0)]


def test_study_writes_its_pages_and_goes_on_where_it_was(toy, monkeypatch, tmp_path):
    done, folder = [], tmp_path / "study"

    def killed(world):
        if world.seed == 1:
            raise KeyboardInterrupt
        return measured(world)

    monkeypatch.setitem(study.SECTIONS, "toy", replace(TOY, measure=killed))
    with pytest.raises(KeyboardInterrupt):
        study.study(folder, sections=["toy"], seeds=(0, 1), workers=1, log=done.append)
    monkeypatch.setitem(study.SECTIONS, "toy", TOY)
    with pytest.raises(FileExistsError, match="--resume"):
        study.study(folder, sections=["toy"], seeds=(0, 1), log=done.append)
    answers = study.study(folder, sections=["toy"], seeds=(0, 1), resume=True, workers=1, log=done.append)
    assert [line for line in done if line.startswith("measured")] == ["measured 0", "measured 1"]
    assert [f.verdict for f in answers[0].findings] == ["appears", "the opposite appears"]

    text = (folder / "study.md").read_text()
    assert "| ours is more accurate | appears | 10.5 ± 0.7 points |" in text
    assert "| ours | 80.5 ± 0.7 | 5.0 ± 0.0 |" in text and "A note." in text and "`robustft study --seeds 0 1" in text
    page = (folder / "study.html").read_text()
    assert "the opposite appears" in page and "a &lt;table&gt;" in page and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # one file that asks nobody for anything
    assert (folder / "figures" / "curve.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "results.json").read_text())["sections"]["toy"]
    assert numbers["claims"][0] == {"claim": "ours is more accurate", "verdict": "appears", "margins": [10.0, 11.0]}
    assert not (folder / "seed-0").exists()


@pytest.mark.exhaustive
def test_a_run_is_trained_once_and_its_weights_survive_a_kill(tmp_path):
    recipe = replace(RECIPES["FT"], epochs=1, batch_size=500)
    lines = []
    world = World(tmp_path, 0, world="digits", quick=True, log=lines.append)
    method = world.train(recipe)
    assert world.train(recipe) is method and len(lines) == 1
    again = World(tmp_path, 0, world="digits", quick=True, log=lines.append).train(recipe)
    torch.testing.assert_close(again.state_dict(), method.state_dict(), rtol=0, atol=0)
    other = world.train(replace(recipe, lr=recipe.lr / 2))
    assert other is not method and len(list((tmp_path / "runs").iterdir())) == 2


PROCESSES = """
import json, sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from robustft.data import glyphworld
from robustft.pipeline import study
data = glyphworld.sets(20)
few = replace(data, train=data.train.subset(range(300)))
glyphworld.sets = lambda limit: few
study.get_context = lambda _: get_context("fork")  # so that processes have few, too
output = Path(sys.argv[1])
answers = study.study(output, world="digits", sections=["calibration"], seeds=(0,), quick=True, workers=2)
(measured,) = answers[0].seeds
assert json.loads((output / "results" / "calibration-0.json").read_text())["tables"] == measured.tables
assert not (output / "seed-0").exists()
"""


@pytest.mark.exhaustive  # trainings in two processes
def test_processes_measure_what_is_missing(python, tmp_path):
    # Where autograd has had threads, as it may have here, no process can be forked that wants some.
    python.run("-c", PROCESSES, tmp_path / "study", check=True)


def test_recipes_say_in_json_which_risk_they_want():
    risk = built_options(json.loads(json.dumps(SPURIOUS["CVaR"].options)), None)["risk"]
    assert isinstance(risk, CVaR) and {"risk": "CVaR", **risk.config} == SPURIOUS["CVaR"].options["risk"]


@pytest.mark.parametrize("errors", [0, 40])
def test_a_model_without_an_error_on_validation_stays_as_it_is(errors):
    generator = torch.Generator().manual_seed(0)

    def predictions(errors):
        labels = torch.randint(5, (200,), generator=generator)
        logits = torch.randn(200, 5, generator=generator) + 9.0 * torch.nn.functional.one_hot(labels, 5)
        found = torch.where(torch.arange(200) < errors, (labels + 1) % 5, labels)
        return Outputs(logits, logits, logits, labels=found)

    world = SimpleNamespace(
        validation=lambda _: predictions(errors), suite=lambda _: Suite(predictions(40), {"s": predictions(40)}, {})
    )
    rows = calibrated(world, None)
    assert (rows[TEMPERATURE] == rows[NONE]) == (errors == 0)
    if errors:
        assert all(rows[TEMPERATURE][column] < rows[NONE][column] for column in ("NLL ID", "ECE ID", "ECE OOD"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sections", "astrology"], "astrology"),
        (["--seeds", "1", "1"], "distinct"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    assert main(["study", "--output", str(tmp_path / "s"), *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_a_section_speaks_of_its_world_s_own_sets():
    digits, icons = (study.section_of("detection", world) for world in ("digits", "icons"))
    assert any("letters" in claim.text for claim in digits.claims)
    assert any("held-out kinds" in claim.text for claim in icons.claims)
    assert not any("letters" in claim.text or "textures" in claim.text for claim in icons.claims)
    assert "frame" in " ".join(study.section_of("drm", "icons").notes.values())
    assert study.section_of("vrf", "icons") is study.SECTIONS["vrf"]


def test_a_command_names_what_is_no_default():
    every = {world: study.sections_of(world) for world in ("icons", "digits")}
    assert study._command("icons", True, (0, 1, 2), every["icons"]) == "robustft study --quick"
    assert study._command("digits", False, (3,), every["digits"]) == "robustft study --world digits --seeds 3"
    assert study._command("icons", False, (0, 1, 2), ("drm",)) == "robustft study --sections drm"


@pytest.mark.parametrize("world", ["digits", "icons"])
def test_a_section_speaks_of_its_world_alone(world):
    others = {"digits": ("frame", "drawing", "studio"), "icons": ("digit", "background", "of 70 steps", "500 images")}
    names = study.sections_of(world)
    assert ("base_to_new" in names) == (world == "icons")
    for name, section in ((name, study.section_of(name, world)) for name in names):
        assert section.name == name
        plots = [f"{plot.title} {plot.caption}" for plot in section.plots]
        said = [section.title, section.question, *(claim.text for claim in section.claims), *plots]
        assert not [text for text in (*said, *section.notes.values()) for word in others[world] if word in text]


def test_recipes_of_icons_are_shorter_by_what_the_benchmark_says():
    icons, digits = benchmark("icons"), benchmark("digits")
    assert all(digits.recipe(recipe, few_shot=True) == recipe for recipe in HOSTS.values())
    ft, coop = (icons.recipe(recipe) for recipe in (RECIPES["FT"], HOSTS["CoOp"]))
    rates = icons.rates
    assert (ft.lr, ft.epochs) == (rates["FineTune"] * RECIPES["FT"].lr, icons.epochs * RECIPES["FT"].epochs)
    assert coop == HOSTS["CoOp"]
    assert icons.recipe(RECIPES["FT"], misled=True).lr == icons.misled_rates["FineTune"] * RECIPES["FT"].lr > ft.lr
    few = icons.recipe(HOSTS["LP-FT"], few_shot=True)  # 46 classes, not 10
    assert (few.lr, few.epochs) == (rates["LPFT"] * HOSTS["LP-FT"].lr, round(30 * 10 / 46))


@pytest.mark.exhaustive  # reads all drawings
def test_a_benchmark_tells_the_steps_and_test_images_that_it_has():
    icons = benchmark("icons")
    recipe, data = icons.recipe(RECIPES["FT"]), icons.sets()
    assert icons.steps == recipe.epochs * (len(data.train) // recipe.batch_size) and icons.tested == len(data.test)
    assert {icons.near, icons.far, *icons.further} == set(data.ood)


def test_words_are_those_whose_embeddings_a_model_has():
    weight = torch.zeros(5, 2)
    weight[[0, 2, 3]] = 1.0
    model = SimpleNamespace(token_embedding=SimpleNamespace(weight=torch.nn.Parameter(weight)))
    decoder = {0: "cat</w>", 1: "dog</w>", 2: "bi", 3: "ox</w>", 4: "!!!</w>"}
    assert words(SimpleNamespace(model=model, tokenizer=SimpleNamespace(decoder=decoder))) == ("cat",)


def test_a_mixed_stream_gives_every_image_its_own_score_back():
    cosines = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    known, more, unknown = (Outputs(part, part) for part in cosines.split((12, 8, 10)))
    detector = Detector("mcm")
    together = detection.mixed(detector, [known, more], unknown, 0)
    apart = torch.cat([detector.scores(known), detector.scores(more)]), detector.scores(unknown)
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected.double())


def row_of(axes, validation=(50.0, 100.0)) -> dict[str, float]:
    return dict(zip((*compositions.AXES, *compositions.VALIDATION), (*axes, *validation), strict=True))


def test_a_composition_is_chosen_by_validation_and_held_against_the_best_single_methods():
    singles = {"a": row_of((80.0, 60.0, 90.0, 9.0)), "b": row_of((82.0, 58.0, 88.0, 7.0))}
    composed = {
        "better": row_of((83.0, 61.0, 91.0, 6.0), (70.0, 90.0)),
        "chosen": row_of((84.0, 62.0, 89.5, 5.0), (71.0, 95.0)),
        "as right": row_of((99.0, 99.0, 99.0, 0.0), (71.0, 96.0)),
    }
    tables = {compositions.SINGLES: singles, compositions.COMPOSED: composed}
    assert compositions.named(compositions.CHOSEN, tables) == "chosen"
    assert compositions.dominates(compositions.CHOSEN)(tables) == -0.5  # of AUROC
    assert compositions.dominates("better")(tables) == 1.0
    assert compositions.lead(compositions.CHOSEN, "ECE OOD")(tables) == 2.0


def test_two_things_fight_where_models_better_at_one_are_worse_at_the_other():
    rows = {str(i): row_of((float(i), float(i**3), float(-i), float(i))) for i in range(5)}
    tables = {compositions.SINGLES: rows, compositions.COMPOSED: {}}
    for other, margin in (("acc OOD", -1.0), (compositions.KNN, 1.0), ("ECE OOD", 1.0)):  # of ECE less is better
        assert compositions.fight("acc ID", other)(tables) == pytest.approx(margin)


def tiny_benchmark(model, prompts):
    """A benchmark of noise in three classes, for a model of two thousand weights."""
    generator = np.random.default_rng(0)

    def noise(count, classes=tuple(prompts["class_names"])):
        images = generator.integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
        labels = torch.arange(count) % len(classes)
        return ImageDataset(images, labels, classes, groups=torch.from_numpy(generator.integers(5, size=count)))

    data = Data(noise(12), noise(6), noise(6), tuple(prompts["class_names"]), {"other": noise(12)}, {"none": noise(6)})
    names = (*prompts["class_names"], "fox")[:4]
    many = Data(noise(8, names), noise(8, names), noise(8, names), names)
    config = {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    model.visual.preprocess_cfg = config["preprocess_cfg"]
    bundle = Bundle(model, prompts["tokenizer"], None, None, config)
    module = SimpleNamespace(
        load_clip=lambda path=None: bundle,
        sets=lambda limit: data,
        concepts=lambda shots, limit: many,
        spurious=lambda split, conflicting: noise(12),
        CLASS_NAMES=prompts["class_names"],
        TEMPLATES=prompts["templates"],
    )
    descriptions = {name: (f"far {name}",) for name in prompts["class_names"]}
    return replace(
        benchmark("icons"),
        module=module,
        descriptions=descriptions,
        by_chance=("red {}", "{} box"),
        contexts=("red {}", "{} box"),
        rates={},
        epochs=1.0,
    )


@pytest.mark.exhaustive  # twelve trainings
def test_what_is_asked_of_the_field_is_measured(tiny_world):
    lines = []
    tiny_world.log = lines.append
    tables = field.measure(tiny_world).tables
    assert len(lines) == 12 and len(list((tiny_world.folder / "runs").iterdir())) == 12  # FT twice, with two seeds
    further = field.further(tiny_world)
    assert list(further) == ["TRACER", "Lipsum-FT", "CAR-FT", "StarFT", "Model Stock of two FT"] and len(lines) == 12
    margins = [claim.margin(tables) for claim in field.SECTION.claims]
    assert len(margins) == 12 and all(math.isfinite(margin) for margin in margins)


@pytest.fixture
def tiny_world(clip_model, prompts, tmp_path, monkeypatch):
    tiny = tiny_benchmark(clip_model.float(), prompts)
    monkeypatch.setattr(study.world, "benchmark", lambda name: tiny)
    monkeypatch.setattr(study.world, "QUICK_EPOCHS", 1)
    return World(tmp_path, 0, world="tiny", quick=True, log=lambda text: None)


def test_outputs_are_the_predictors_own_and_a_tower_encodes_a_set_once(tiny_world, monkeypatch):
    zero_shot = tiny_world.zero_shot
    other = zero_shot._with(zero_shot.classes, class_embeddings=zero_shot.class_embeddings.flip(0))
    mixture = OutputEnsemble(zero_shot, other).at(0.3)
    test = tiny_world.tests.id
    expected = [predictor.predict(test) for predictor in (zero_shot, other, mixture)]
    passes = []
    encode = study.world.clip.encode
    monkeypatch.setattr(study.world.clip, "encode", lambda *a, **k: passes.append(encode(*a, **k)) or passes[-1])
    found = [tiny_world.outputs(predictor, test) for predictor in (zero_shot, other, mixture)]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.classes == theirs.classes
        for part in ("features", "cosines", "logits", "labels"):
            torch.testing.assert_close(getattr(mine, part), getattr(theirs, part))
    kept = list((tiny_world.folder / "features").rglob("*.safetensors"))
    assert len(kept) == len(passes) == 1
    halfway = WiSEFT(zero_shot, other).at(0.5)  # of one tower: nothing to encode
    tiny_world.outputs(halfway, test)
    assert list((tiny_world.folder / "features").rglob("*.safetensors")) == kept


@pytest.mark.exhaustive  # five trainings
def test_prompts_of_base_classes_are_measured_on_new_ones(tiny_world):
    tables = base_to_new.measure(tiny_world).tables
    assert tables[base_to_new.NEW]["zero-shot"]["DAC"] == tables[base_to_new.NEW]["zero-shot"]["as it is"]
    assert tables[base_to_new.NEW]["CoOp"].keys() - tables[base_to_new.NEW]["CoCoOp"].keys() == {
        "DAC",
        "temperature and DAC",
    }
    for claim in base_to_new.SECTION.claims:
        assert math.isfinite(claim.margin(tables))


@pytest.mark.exhaustive  # fourteen trainings
def test_two_risks_are_measured_where_frames_mislead(tiny_world):
    tables = drm.measure(tiny_world).tables
    margins = [claim.margin(tables) for claim in drm.section(tiny_world.benchmark).claims]
    assert all(math.isfinite(margin) for margin in margins)


@pytest.mark.exhaustive  # a training
def test_frontiers_of_all_mixtures_end_at_zero_shot_and_fine_tuned(tiny_world):
    found = vrf.compare(tiny_world, "FT")
    ends = [(found.table[name]["acc ID"], found.table[name]["acc OOD"]) for name in ("zero-shot", "FT")]
    for known, shifted in found.frontiers.values():
        assert [(known[0], shifted[0]), (known[-1], shifted[-1])] == ends and len(known) == 11
