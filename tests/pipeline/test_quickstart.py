"""The main job, the command line and the README, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from targets import exhaustive

from robustft import cli, clip, doctor, methods
from robustft.data import glyphworld, iconworld
from robustft.data.pretrain import pretrain
from robustft.evaluation import Evaluation, report
from robustft.evaluation.measure import predict_sets
from robustft.pipeline import quickstart, recipes, worlds
from robustft.pipeline.job import suite_of
from robustft.training.run import in_use

README = Path(__file__).parents[2] / "README.md"


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


# The command on a tenth of its images, for one epoch, with blank pictures, in names that it does not see.
FEW = """
import sys
from dataclasses import replace
from robustft import cli
from robustft.data import glyphworld
from robustft.evaluation import report
from robustft.pipeline import quickstart

def few(limit, sets=glyphworld.sets):
    data = sets(20)
    return replace(data, train=data.train.subset(range(200)), validation=data.validation.subset(range(40)))

glyphworld.sets = few
report.render = lambda drawing: (b"\\x89PNG", "<svg></svg>")
quickstart.QUICK_EPOCHS = 1
sys.exit(cli.main(sys.argv[1:]))
"""
SHORT = "-c", FEW, "quickstart", "--quick", "--limit-batches", "1", "--output", "out"


@pytest.fixture(scope="module", params=["few", *exhaustive("whole")])
def run(request, tmp_path_factory, python):
    """A short but whole run, or the one that .ci/run has made: its folder, what it printed, and how many images of a
    test set it saw."""
    if request.param == "whole":
        folder = README.parent / "runs" / "quickstart"
        if not (log := folder.with_suffix(".log")).exists():
            pytest.skip(f"no {log}: robustft quickstart 2>&1 | tee {log}")
        return folder, log.read_text(), None
    folder = tmp_path_factory.mktemp("quickstart")
    done = python.run(*SHORT, folder=folder, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout + done.stderr, 20


@pytest.fixture(scope="module")
def made():
    return glyphworld.sets(20)


@pytest.fixture
def few(made, monkeypatch):
    """The benchmark, made once for all that begin a run in this process."""
    monkeypatch.setattr(glyphworld, "sets", lambda limit: made)


@pytest.fixture
def robustft(few, capsys):
    """The command: its exit code and what it printed."""

    def command(*arguments):
        return cli.main(arguments), *capsys.readouterr()

    return command


def test_it_prints_one_table_of_all_models(run):
    _, printed, _ = run
    for name in ("zero-shot", "FT", "FLYP", "CaRot", "WiSE FT", "OSE FT", "WiSE FLYP", "OSE CaRot"):
        assert re.search(rf"^{name} +\d", printed, re.MULTILINE), name
    assert "ECE: 15 equal-width bins, full set" in printed and "FPR95: ID positive" in printed


def test_its_schedules_know_of_the_limit_on_batches(run):
    _, printed, _ = run
    assert "was made for total_steps" not in printed


def test_it_leaves_everything_it_promises(run):
    folder, *_ = run
    expected = ["report.html", "metrics.json", "metrics.jsonl", "config.yaml"]
    expected += [f"{name}/checkpoints" for name in quickstart.RECIPES]
    assert [name for name in expected if not (folder / name).exists()] == []
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {"frontier", "reliability", "scores", "samples"}
    assert "https://" not in (folder / "report.html").read_text().replace("https://www.w3.org", "")
    evaluation = Evaluation.from_dict(json.loads((folder / "metrics.json").read_text()))
    assert len(evaluation.models) == 10
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["method"] for record in records} == set(quickstart.RECIPES)


def test_no_temporary_file_is_left(run):
    folder, *_ = run
    assert [str(p) for p in folder.rglob("*") if "tmp" in p.name or p.name.startswith(".")] == []


@pytest.mark.parametrize("step", [5, *exhaustive(1)])
def test_exports_load_back_bit_for_bit(run, step):
    folder, *_ = run
    open_clip = clip.import_open_clip()
    images, _ = glyphworld.digits("test").tensors((0.5,) * 3, (0.25,) * 3)
    for path in sorted(p for p in (folder / "export").iterdir() if p.is_dir())[::step]:
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
        ours = clip.load(f"local-dir:{path}").model
        assert all(
            torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
        )
        with torch.no_grad():
            assert torch.equal(theirs.eval().encode_image(images[:4]), ours.encode_image(images[:4]))
        assert transform(glyphworld.digits("test")[0][0]).shape == (3, 28, 28)


def test_exported_flyp_predicts_what_the_table_says(run):
    folder, _, limit = run
    bundle = clip.load(f"local-dir:{folder / 'export' / 'flyp'}")
    names = {"class_names": glyphworld.CLASS_NAMES, "templates": glyphworld.TEMPLATES}
    classifier = methods.zero_shot_classifier(bundle.model, tokenizer=bundle.tokenizer, **names)
    predictions = classifier.predict(glyphworld.sets(limit).test)
    accuracy = (predictions.logits.argmax(1) == predictions.labels).double().mean().item()
    evaluation = Evaluation.from_dict(json.loads((folder / "metrics.json").read_text()))
    assert accuracy == evaluation.models["FLYP"].id_accuracy


@pytest.mark.exhaustive
@pytest.mark.parametrize("run", ["few"], indirect=True)
def test_exports_predict_what_the_table_says(run):
    folder, _, limit = run
    table = Evaluation.from_dict(json.loads((folder / "metrics.json").read_text())).models
    exported = [name for name in table if not name.startswith("OSE")]  # which has no model of its own
    assert {name.lower().replace(" ", "-") for name in exported} == {p.name for p in (folder / "export").iterdir()}
    test = glyphworld.sets(limit).test
    for name in exported:
        predictions = methods.load_predictor(folder / "export" / name.lower().replace(" ", "-")).predict(test)
        accuracy = (predictions.logits.argmax(1) == predictions.labels).double().mean().item()
        assert accuracy == table[name].id_accuracy, name


def test_a_folder_that_holds_a_run_is_refused_and_untouched(run, robustft):
    folder, *_ = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    code, _, told = robustft("quickstart", "--quick", "--output", str(folder))
    assert code == 1 and "already holds a run" in told and "Traceback" not in told
    code, _, told = robustft("quickstart", "--seed", "5", "--resume", "--output", str(folder))
    assert code == 1 and "another configuration" in told
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.exhaustive  # the plain run kills one that is pre-training, below, and test_fit.py kills processes
@pytest.mark.parametrize("run", ["few"], indirect=True)
def test_a_killed_run_resumes_to_the_same_numbers(run, tmp_path, python):
    folder, *_ = run
    process = python.start(*SHORT, folder=tmp_path, environment=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("FLYP/checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "metrics.json").exists()
    resumed = python.run(*SHORT, "--resume", folder=tmp_path, environment=ENVIRONMENT)
    assert resumed.returncode == 0, resumed.stderr
    results = [json.loads((f / "metrics.json").read_text()) for f in (folder, tmp_path / "out")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "cuda:99"},
        {"limit_batches": 0},
        {"precision": "fp8"},
        {"from_scratch": True, "pretrain_pairs": 10},
        {"pretrain_pairs": 640},
    ],
)
def test_a_start_that_fails_does_not_claim_the_folder(tmp_path, few, wrong):
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        quickstart.quickstart(tmp_path / "out", log=lambda _: None, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_torch_without_cuda_is_an_error_without_a_traceback(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(quickstart, "quickstart", fail)
    assert cli.main(["quickstart", "--device", "cuda", "--output", str(tmp_path / "out")]) == 1
    assert "robustft quickstart: Torch not compiled with CUDA" in capsys.readouterr().err


def test_a_second_process_in_the_folder_is_refused_before_it_changes_anything(tmp_path, few):
    (tmp_path / "config.yaml").write_text("seed: 0")
    with in_use(tmp_path), pytest.raises(BlockingIOError, match="is in use by another run"):
        quickstart.quickstart(tmp_path, quick=True, resume=True, log=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.exhaustive
def test_half_pre_trained_model_is_finished_before_it_is_fine_tuned(tmp_path, few, monkeypatch):
    monkeypatch.setattr(report, "render", lambda drawing: (b"\x89PNG", "<svg></svg>"))
    monkeypatch.setattr(quickstart, "pretrain", partial(pretrain, save_every=64))
    monkeypatch.setattr(quickstart, "SECONDS_BETWEEN_LINES", 0.0)
    arguments = {"from_scratch": True, "pretrain_pairs": 256, "quick": True, "limit_batches": 1, "method_names": ["FT"]}
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if "128 of 256 pairs" in line and len(lines) < 10:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quickstart.quickstart(tmp_path / "out", log=log, **arguments)
    # Neither a half pre-trained model nor a fine-tuning that was killed during its first save stands in the way.
    (tmp_path / "out" / "FT" / "checkpoints" / ".step_00000000.tmp").mkdir(parents=True)
    lines.clear()
    quickstart.quickstart(tmp_path / "out", resume=True, log=lines.append, **arguments)
    assert [line.split(",")[0] for line in lines if line.startswith("pre-training:")] == [
        "pre-training: 192 of 256 pairs",
        "pre-training: 256 of 256 pairs",
    ]
    whole = pretrain(tmp_path / "whole.safetensors", pairs=256)
    assert (tmp_path / "out" / "pretrained.safetensors").read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "out").glob("pretraining*"))


def test_dry_run_writes_nothing(tmp_path, robustft):
    code, out, told = robustft("quickstart", "--dry-run", "--output", str(tmp_path / "out"))
    assert code == 0 and "nothing was written" in out, told
    assert list(tmp_path.iterdir()) == []


def test_unknown_method_is_named(tmp_path, robustft):
    code, _, told = robustft("quickstart", "--methods", "FLYP", "SAM", "--output", str(tmp_path / "out"))
    assert code == 1 and "expected some of FT, FLYP, CaRot" in told
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_file_is_refused(tmp_path, robustft):
    (tmp_path / "out").write_text("mine")
    code, _, told = robustft("quickstart", "--output", str(tmp_path / "out"))
    assert code == 1 and "is a file" in told
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_is_said_before_training(tmp_path, few, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        quickstart.quickstart(tmp_path / "out", log=lambda _: None)


def test_mixed_predictions_are_the_ensembles_own(made):
    bundle = glyphworld.load_clip()
    names = {"class_names": glyphworld.CLASS_NAMES, "templates": glyphworld.TEMPLATES}
    zero_shot = methods.zero_shot_classifier(bundle.model, tokenizer=bundle.tokenizer, **names)
    flipped = methods.Classifier(bundle.model, -zero_shot.class_embeddings, glyphworld.CLASS_NAMES, logit_scale=3.0)
    ensemble = methods.OutputEnsemble(zero_shot, flipped, temperatures=(1.5, 0.8)).at(0.3)
    tests = suite_of(made)
    together = predict_sets({"a": zero_shot, "b": flipped, "mixed": ensemble}, tests)["mixed"]
    for ours, data in ((together.id, tests.id), (together.shifts["font"], tests.shifts["font"])):
        direct = ensemble.predict(data)
        assert torch.equal(ours.logits, direct.logits) and torch.equal(ours.cosines, direct.cosines)


def test_doctor_passes_here():
    lines: list[str] = []
    assert doctor.run(lines.append) == 0, "\n".join(lines)
    assert any("contrastive_distillation_loss (cpu)" in line for line in lines)


def test_doctor_fails_with_a_cure(monkeypatch):
    from robustft.ops import reference

    monkeypatch.setattr(reference, "contrastive_loss", lambda x, t, s, *_: (x * t).sum(1) * s)
    lines: list[str] = []
    assert doctor.run(lines.append) == 1
    assert any(line.startswith("FAIL contrastive_loss (cpu)") for line in lines)
    assert any(line.startswith("contrastive_loss (cpu): pip install") for line in lines)


def test_every_world_that_the_command_names_has_its_benchmark():
    assert [worlds.benchmark(name).name for name in recipes.WORLDS] == [one.name for one in worlds._BENCHMARKS]


@pytest.mark.parametrize(
    "arguments, message", [({"world": "moon"}, "digits, icons, got 'moon'"), ({"from_scratch": True}, "IconWorld's")]
)
def test_a_world_that_is_none_or_has_no_scratch_is_said(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quickstart.quickstart(tmp_path / "out", **{"world": "icons", **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive  # trainings
def test_the_icons_are_run_like_the_digits(tmp_path, monkeypatch):
    data = iconworld.sets(12)
    few = replace(data, train=data.train.subset(range(100)), validation=data.validation.subset(range(20)))
    few = replace(few, shifts={"fxemoji": few.shifts["fxemoji"]}, ood={"symbols": few.ood["symbols"]})
    monkeypatch.setattr(iconworld, "sets", lambda limit: few)
    monkeypatch.setattr(report, "render", lambda drawing: (b"", "<svg></svg>"))
    lines = []
    names = ("FT",)
    result = quickstart.quickstart(
        tmp_path / "out",
        world="icons",
        method_names=names,
        quick=True,
        limit_batches=1,
        progress=False,
        log=lines.append,
    )
    assert lines[0].startswith("IconWorld: 100 training, 20 validation, 12 test drawings; 1 shifts, 1 OOD sets")
    assert {"zero-shot", *names, *(f"WiSE {name}" for name in names)} <= set(result.evaluation.models)
    assert "emoji of two studios" in (tmp_path / "out" / "report.html").read_text()
