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
from robustft.evaluation import Suite
from robustft.methods import CVaR
from robustft.pipeline import study
from robustft.pipeline.quickstart import RECIPES
from robustft.pipeline.study import field
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
from robustft.pipeline.study.recipes import SPURIOUS
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
    seeds = [measured(World(None, seed, log=lambda text: None)) for seed in (0, 1)]
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
    world = World(tmp_path, 0, quick=True, log=lines.append)
    method = world.train(recipe)
    assert world.train(recipe) is method and len(lines) == 1
    again = World(tmp_path, 0, quick=True, log=lines.append).train(recipe)
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
answers = study.study(output, sections=["calibration"], seeds=(0,), quick=True, workers=2)
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
    assert study._command("icons", True, (0, 1, 2), tuple(study.SECTIONS)) == "robustft study --world icons --quick"


def tiny_benchmark(model, prompts):
    """A benchmark of noise in three classes, for a model of two thousand weights."""
    generator = np.random.default_rng(0)

    def noise(count, classes=tuple(prompts["class_names"])):
        images = generator.integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
        return ImageDataset(images, torch.arange(count) % len(classes), classes)

    data = Data(noise(12), noise(6), noise(6), tuple(prompts["class_names"]), {"other": noise(6)}, {"none": noise(6)})
    config = {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    model.visual.preprocess_cfg = config["preprocess_cfg"]
    bundle = Bundle(model, prompts["tokenizer"], None, None, config)
    module = SimpleNamespace(
        load_clip=lambda path=None: bundle,
        sets=lambda limit: data,
        CLASS_NAMES=prompts["class_names"],
        TEMPLATES=prompts["templates"],
    )
    return replace(benchmark("icons"), module=module, by_chance=("red {}", "{} box"), rate=1.0)


@pytest.mark.exhaustive  # ten trainings
def test_what_is_asked_of_the_field_is_measured(clip_model, prompts, tmp_path, monkeypatch):
    tiny = tiny_benchmark(clip_model.float(), prompts)
    monkeypatch.setattr(study.world, "benchmark", lambda name: tiny)
    monkeypatch.setattr(study.world, "QUICK_EPOCHS", 1)
    lines = []
    world = World(tmp_path, 0, world="tiny", quick=True, log=lines.append)
    tables = field.measure(world).tables
    assert len(lines) == 10 and len(list((tmp_path / "runs").iterdir())) == 10  # FT twice, with two seeds
    margins = [claim.margin(tables) for claim in field.SECTION.claims]
    assert len(margins) == 12 and all(math.isfinite(margin) for margin in margins)
