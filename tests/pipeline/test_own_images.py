"""A folder of images to a decision, as somebody with one meets it."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import re
import shutil
import tarfile
import threading
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from targets import exhaustive

import robustft
from robustft import cli, clip
from robustft.data import glyphworld, stress
from robustft.data.images import read_image
from robustft.evaluation import Evaluation, report
from robustft.pipeline import flags
from robustft.pipeline.arguments import ImageSets
from robustft.pipeline.checking import check_data
from robustft.pipeline.evaluating import evaluate_runs, run_names
from robustft.pipeline.exporting import export_run
from robustft.pipeline.recipes import LORA_LR
from robustft.pipeline.serving import Unreadable
from robustft.pipeline.train import train
from robustft.predictors.base import predict_each

RATE = {"lr": 3e-3, "epochs": 1, "batch_size": 20, "log": lambda _: None, "progress": False}


def tree(root: Path, dataset, count: int, *, flat: bool = False) -> Path:
    for index in range(count):
        image, label = dataset[index]
        folder = root if flat else root / dataset.classes[label].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    return root


def belongings(root: Path, train: int, validation: int, test: int, shift: int, ood: int) -> Path:
    """Somebody's folder, with so many images, and a model of somebody's as open_clip saves it."""
    tree(root / "photos" / "train", glyphworld.digits("train"), train)
    tree(root / "photos" / "val", glyphworld.digits("validation"), validation)
    tree(root / "photos" / "test", glyphworld.digits("test"), test)
    tree(root / "photos" / "shifts" / "inverted", glyphworld.shift("inverted"), shift)
    tree(root / "photos" / "ood" / "letters", glyphworld.ood("letters"), ood, flat=True)
    bundle = glyphworld.load_clip()
    clip.export(bundle.model, root / "clip", bundle.config, tokenizer=bundle.tokenizer)
    return root


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    return belongings(tmp_path_factory.mktemp("own"), 80, 60, 40, 30, 20)


@pytest.fixture(scope="session")
def run(own):
    return train(own / "photos", model=f"local-dir:{own / 'clip'}", output=own / "run", **RATE)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """The pictures of all reports but `run`'s are blank: drawing takes most of the time of a small run."""
    monkeypatch.setattr(report, "render", lambda drawing: (b"\x89PNG", "<svg></svg>"))


def test_a_run_explains_itself(run, own):
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "split.csv",
        "metrics.jsonl",
        "metrics.json",
        "predictions.csv",
        "report.html",
        "model",
    }
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["methods"]["CaRot"]["lr"] == 3e-3 and config["seed"] == 0 and config["data"] == str(own / "photos")
    split = list(csv.DictReader((run.folder / "split.csv").open()))
    assert len(split) == 80 + 60 + 40 + 30 + 20
    rows = list(csv.DictReader((run.folder / "predictions.csv").open()))
    assert len(rows) == 40 + 30 + 20 and {row["label"] for row in rows if row["set"] == "ood/letters"} == {""}
    right = [row["label"] == row["prediction"] for row in rows if row["set"] == "test"]
    assert sum(right) / len(right) == run.evaluation.models[run.chosen].id_accuracy
    card = (run.folder / "model" / "README.md").read_text()
    assert f"chosen on validation data: {run.chosen}" in card and "acc OOD" in card
    measured = Evaluation.from_dict(json.loads((run.folder / "metrics.json").read_text()))
    assert measured.models == run.evaluation.models


def test_every_form_of_an_image_gets_the_same_decision(run):
    pipeline = robustft.load(run.folder)
    rows = [row for row in csv.DictReader((run.folder / "predictions.csv").open())][::10]
    files = [row["file"] for row in rows]
    found = pipeline(files)
    for alone, among_others in zip(map(pipeline, files), found, strict=True):  # of another batch size, other last bits
        assert alone[:1] == among_others[:1] and alone[1:3] == pytest.approx(among_others[1:3], abs=1e-5)
    images = [Image.open(file).convert("RGB") for file in files]
    assert pipeline(images) == found and pipeline([np.asarray(image) for image in images]) == found
    assert pipeline(torch.stack([pipeline.transform(image) for image in images])) == found
    assert [found for _, found in pipeline.stream(files)] == found
    for row, prediction in zip(rows, found, strict=True):
        assert (row["prediction"], row["accepted"]) == (prediction.label, str(prediction.accepted))
        assert float(row["probability"]) == pytest.approx(prediction.probability, abs=1e-5)
        assert float(row["ood_score"]) == pytest.approx(prediction.ood_score, abs=1e-5)
        assert prediction.top[0] == (prediction.label, prediction.probability) and len(prediction.top) == 5


def test_threads_take_turns_at_one_model(run):
    pipeline = robustft.load(run.folder)
    files = [row["file"] for row in csv.DictReader((run.folder / "predictions.csv").open())][:8]
    alone, together = [pipeline(file) for file in files], [None] * len(files)

    def work(place):
        together[place] = pipeline(files[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (3, TypeError, "expected a file, an image, an array or a tensor, got 3"),
        (np.zeros((4, 4, 3)), TypeError, "arrays must be uint8"),
        (torch.zeros(4, 4), ValueError, r"images must be a tensor \(C, H, W\)"),
        ("nowhere.jpg", FileNotFoundError, "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_said(run, wrong, error, message):
    with pytest.raises(error, match=message):
        robustft.load(run.folder)(wrong)


def test_predict_streams_files_and_says_what_it_could_not_read(run, own, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no image")
    folder = str(own / "photos" / "ood" / "letters")
    assert cli.main(["predict", str(run.folder), folder, str(tmp_path / "broken.jpg"), "--json", "--top", "2"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 21 and "broken.jpg" in lines[-1]["error"] and "1 of 21 files could not be read" in err
    assert (
        set(lines[0]) == {"file", "label", "probability", "ood_score", "accepted", "top", "classes"}
        and len(lines[0]["top"]) == 2
    )
    assert cli.main(["predict", str(run.folder), folder, "--csv"]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["label"] for row in table] == [line["label"] for line in lines[:-1]]
    assert cli.main(["predict", str(run.folder), folder]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 21


@pytest.mark.parametrize("form", ["--csv", *exhaustive("--json")])
def test_a_killed_prediction_goes_on_behind_its_last_line(run, own, tmp_path, capsys, form):
    command = ["predict", str(run.folder), str(own / "photos" / "ood" / "letters"), form, "--workers", "0"]
    output = ["--output", str(tmp_path / "new" / "found")]
    assert cli.main([*command, *output]) == 0
    whole = (tmp_path / "new" / "found").read_text()
    assert cli.main(command) == 0 and capsys.readouterr().out == whole
    assert cli.main([*command, *output]) == 1 and "is there already" in capsys.readouterr().err
    for kept in (len(whole) // 2, 3, 0):  # a kill in the middle, in the first line, before it
        (tmp_path / "new" / "found").write_text(whole[:kept])
        assert cli.main([*command, *output, "--resume"]) == 0
        found = (tmp_path / "new" / "found").read_text().splitlines()
        assert [line.split(",")[:2] for line in found] == [line.split(",")[:2] for line in whole.splitlines()]
    assert cli.main([*command, *output, "--resume"]) == 0
    assert (tmp_path / "new" / "found").read_text().splitlines() == found
    (tmp_path / "new" / "found").write_text("something, else\n")
    assert cli.main([*command, *output, "--resume"]) == 1
    assert "that predict wrote" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 1 and "resume needs an output file" in capsys.readouterr().err


def test_unreadable_files_do_not_stop_a_stream(run, own, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    good = sorted((own / "photos" / "ood" / "letters").iterdir())[0]
    found = dict(robustft.load(run.folder).stream([good, tmp_path / "broken.jpg", good], workers=2))
    assert isinstance(found[str(tmp_path / "broken.jpg")], Unreadable) and found[str(good)].label


def test_runs_are_measured_again_beside_zero_shot(run, own, tmp_path):
    told: list[str] = []
    again = evaluate_runs(
        own / "photos", [run.folder], model=f"local-dir:{own / 'clip'}", output=tmp_path / "report", log=told.append
    )
    assert set(again.models) == {"zero-shot", "run"} and (tmp_path / "report" / "report.html").is_file()
    assert again.models["run"].id_accuracy == run.evaluation.models[run.chosen].id_accuracy
    ours, theirs = (e.models["zero-shot"].shifts["inverted"].calibration for e in (again, run.evaluation))
    assert ours.accuracy == theirs.accuracy and ours.ece == pytest.approx(theirs.ece, abs=1e-6)
    whole = evaluate_runs(own / "photos" / "test", [run.folder], log=told.append, progress=False)
    assert whole.models["run"].id_accuracy == again.models["run"].id_accuracy


def test_a_killed_measurement_goes_on_where_it_was(run, own, tmp_path, monkeypatch):
    monkeypatch.setattr("robustft.pipeline.kept.CHUNK", 16)
    settings = {"log": lambda _: None, "progress": False, "cache": tmp_path / "cache"}
    read: list[str] = []
    monkeypatch.setattr("robustft.data.paths.read_file", lambda file: read.append(file) or read_image(file))
    monkeypatch.setattr("robustft.pipeline.kept.predict_each", killed := Killed(2))
    with pytest.raises(KeyboardInterrupt):
        evaluate_runs(own / "photos", [run.folder], **settings)
    killed.after = 100
    found = evaluate_runs(own / "photos", [run.folder], **settings)
    assert len(read) == 40 + 30 + 20
    again = evaluate_runs(own / "photos", [run.folder], **settings)
    assert len(read) == 40 + 30 + 20 and again.models == found.models
    whole = evaluate_runs(own / "photos", [run.folder], log=lambda _: None, progress=False)
    assert found.models["run"].id_accuracy == whole.models["run"].id_accuracy
    assert found.models["run"].id.calibration.nll == pytest.approx(whole.models["run"].id.calibration.nll, abs=1e-6)
    assert found.models["run"].auroc == pytest.approx(whole.models["run"].auroc, abs=1e-6)
    for path in (tmp_path / "cache").iterdir():
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="predicting again"):
        assert evaluate_runs(own / "photos", [run.folder], **settings).models == found.models


class Killed:
    """`predict_each`, until it has been called so often."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, *arguments, **options):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return predict_each(*arguments, **options)


def test_reports_of_runs_stand_on_one_page(run, own, tmp_path, capsys):
    other = own / "photos" / "ood" / "letters"
    evaluate_runs(own / "photos", [run.folder], output=tmp_path / "later", log=lambda _: None, progress=False)
    assert cli.main(["report", str(run.folder), str(tmp_path / "later"), "--output", str(tmp_path / "both")]) == 0
    assert {"zero-shot", "model", "run"} <= set(
        Evaluation.from_dict(json.loads((tmp_path / "both" / "metrics.json").read_text())).models
    )
    assert cli.main(["report", str(other), "--output", str(tmp_path / "none")]) == 1
    assert "holds no metrics.json" in capsys.readouterr().err


def test_sets_of_classes_hold_the_likeliest_and_are_saved(run, own):
    pipeline = robustft.load(run.folder)
    for found in pipeline(sorted((own / "photos" / "test").rglob("*.png"))[:10]):
        assert found.label in found.classes
    coverage = run.evaluation.models["model"].id
    assert pipeline.conformal.coverage == 0.9 and coverage is not None


def test_nothing_to_measure_is_said(own):
    with pytest.raises(ValueError, match="there is nothing to measure: name runs, or a zero-shot model"):
        evaluate_runs(own / "photos", [])


def test_names_of_runs_are_the_shortest_that_tell_them_apart():
    assert list(run_names(["a/x", "b/x"])) == ["a/x", "b/x"] and list(run_names(["a/x", "b/y"])) == ["x", "y"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("form", "precision"), [("torch-export", "fp16"), ("onnx", "fp32")])
def test_a_graph_decides_as_the_run_without_robustft(run, tmp_path, form, precision, monkeypatch, capsys):
    told: list[str] = []
    folder = export_run(run.folder, to=form, output=tmp_path / "served", precision=precision, log=told.append)
    assert "8 images of the run" in told[0]
    about = json.loads((folder / "model.json").read_text())
    pipeline = robustft.load(run.folder)
    assert about["classes"] == list(pipeline.classes) and about["precision"] == precision
    assert about["threshold"] == pipeline.detector.threshold_
    monkeypatch.chdir(tmp_path)
    files = [Path(row["file"]) for row in csv.DictReader((run.folder / "predictions.csv").open())][:2]
    for file, name in zip(files, "ab", strict=True):
        Image.open(file).save(f"{name}.jpg")
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    shown = re.search(r"```python\n(import json\n.*?)```", page, re.DOTALL)[1]
    call = re.search(rf"\| `{form}` \| `(.*?)` \|", page)[1]  # in the place of the one shown
    shown = re.sub(r"^probabilities, scores = .*$", f"probabilities, scores = {call}", shown, flags=re.MULTILINE)
    exec(shown, {"onnxruntime": importlib.import_module("onnxruntime")})
    lines = [line.rsplit(" ", 2) for line in capsys.readouterr().out.splitlines()]
    for found, (label, probability, accepted) in zip(pipeline(["a.jpg", "b.jpg"]), lines, strict=True):
        assert label == found.label and accepted == str(found.accepted)
        assert float(probability) == pytest.approx(found.probability, abs=0.02)
    with pytest.raises(FileExistsError, match="is not empty"):
        export_run(run.folder, to=form, output=folder, log=told.append)


@pytest.mark.parametrize("form", ["open_clip", *exhaustive("transformers")])
def test_an_export_is_held_against_the_run(run, tmp_path, form):
    told: list[str] = []
    folder = export_run(run.folder, to=form, output=tmp_path / "out", log=told.append)
    assert "8 images of the run" in told[0]
    if form == "open_clip":
        theirs, _, _ = clip.import_open_clip().create_model_and_transforms(f"local-dir:{folder}")
        ours = robustft.load(run.folder).predictor.model
        assert all(
            torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
        )
    with pytest.raises(FileExistsError, match="is not empty"):
        export_run(run.folder, to=form, output=tmp_path / "out", log=told.append)


@pytest.fixture(scope="session")
def adapted(own):
    """A run whose model has adapters, made on the command line."""
    model = f"local-dir:{own / 'clip'}"
    flags = (
        "--method flyp --tune lora --lora-rank 2 --lora-targets attn c_fc --ensemble none --epochs 1 --batch-size 40"
    )
    output = own / "adapted"
    assert cli.main(["train", str(own / "photos"), "--model", model, "--output", str(output), *flags.split()]) == 0
    return output


@pytest.mark.exhaustive
def test_a_run_of_adapters_keeps_them_alone_and_serves(adapted, own):
    found = {path.name: path.stat().st_size for path in (adapted / "model").iterdir()}
    assert clip.WEIGHTS_FILE not in found and found["adapter_model.safetensors"] < 1e5
    assert yaml.safe_load((adapted / "config.yaml").read_text())["methods"]["FLYP"]["lr"] == LORA_LR
    pipeline = robustft.load(adapted)
    rows = list(csv.DictReader((adapted / "predictions.csv").open()))[:4]
    assert [found.label for found in pipeline([row["file"] for row in rows])] == [row["prediction"] for row in rows]
    checkpoint = next((adapted / "FLYP" / "checkpoints").glob("step_*/state.safetensors"))
    assert checkpoint.stat().st_size < (own / "clip" / clip.WEIGHTS_FILE).stat().st_size


def test_what_is_to_be_trained_is_checked_before_anything_is(own):
    settings = {"model": f"local-dir:{own / 'clip'}", "output": own / "no", **RATE}
    for options, words in (
        ({"methods": ["CoOp"], "tune": "lora"}, "CoOp trains nothing of the model"),
        ({"tune": "prompts"}, "CaRot learns none: CoOp, "),
        ({"lora_rank": 2}, 'lora describes the adapters of tune="lora"'),
        ({"tune": "lora", "lora_rank": 0}, "rank must be"),
    ):
        with pytest.raises(ValueError, match=words):
            train(own / "photos", **settings, **options)
    assert not (own / "no").exists()


@pytest.mark.parametrize("form", exhaustive("open_clip", "transformers", "torch-export"))  # by which ONNX's is made
def test_an_export_of_adapters_is_merged(adapted, tmp_path, form):
    folder = export_run(adapted, to=form, output=tmp_path / "out", log=lambda _: None)
    if form == "open_clip":
        theirs, _, _ = clip.import_open_clip().create_model_and_transforms(f"local-dir:{folder}")
        merged = clip.merged(robustft.load(adapted).predictor.model).state_dict()
        assert all(torch.equal(value, merged[name]) for name, value in theirs.state_dict().items())
        assert not (folder / "base.json").exists()
        file = next(row["file"] for row in csv.DictReader((adapted / "predictions.csv").open()))
        assert robustft.load(folder)(file).label == robustft.load(adapted)(file).label


def test_an_export_that_computes_something_else_is_not_left_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr("robustft.pipeline.exporting._open_clip", lambda *_: 0.1)
    with pytest.raises(ValueError, match="differs from the run by 0.1 on 8 images of the run"):
        export_run(run.folder, to="open_clip", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_refused_and_resumed_from_its_folder_alone(run, own, capsys):
    before = (run.folder / "metrics.json").read_bytes()
    arguments = ["train", str(own / "photos"), "--model", f"local-dir:{own / 'clip'}", "--output", str(run.folder)]
    assert cli.main([*arguments, "--lr", "3e-3"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(run.folder)]) == 0
    assert (run.folder / "metrics.json").read_bytes() == before
    assert cli.main([*arguments, "--resume", "--lr", "1e-3"]) == 1
    assert "another configuration" in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_images(run, own, capsys):
    added = own / "photos" / "ood" / "letters" / "new.png"
    Image.new("RGB", (28, 28)).save(added)
    try:
        assert cli.main(["train", "--resume", "--output", str(run.folder)]) == 1
    finally:
        added.unlink()
    assert "images were added or taken away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["carrot"]}, "methods: 'carrot' is none of CaRot, FLYP"),
        ({"methods": ["nowhere:Mine"]}, "method 'nowhere:Mine' cannot be imported: No module named 'nowhere'"),
        ({"methods": ["pathlib:Path"]}, "expected a subclass of robustft.methods.Method"),
        ({"methods": ["DRM"]}, "DRM needs descriptions"),
        ({"methods": ["star-ft"]}, "StarFT needs captions with spurious attributes: methods: {StarFT: "),
        ({"methods": ["CAR-FT"]}, "CARFT needs two templates or more"),
        ({"methods": ["group-dro"]}, "this method needs groups"),
        ({"model": "ViT-B-32"}, "pretrained is missing: without it ViT-B-32 has random weights"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"templates": "nowhere.txt"}, "templates: 'nowhere.txt' is no file and none of photo, simple, imagenet"),
        ({"score": "mmc"}, "score must be one of"),
        ({"ensemble": "soup"}, "ensemble must be one of"),
        ({"compile_mode": "reduce-overhead", "device": "cpu"}, "records CUDA graphs, and the method is on cpu"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(own, tmp_path, changes, message):
    arguments = {"model": f"local-dir:{own / 'clip'}", **RATE, **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(own / "photos", output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(own, tmp_path):
    assert (
        train(own / "photos", model=f"local-dir:{own / 'clip'}", output=tmp_path / "out", dry_run=True, **RATE) is None
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flags", "mode"), [(["--compile"], "default"), (["--compile-mode", "max-autotune"], "max-autotune")]
)
def test_towers_are_compiled_where_that_is_asked_for(own, tmp_path, monkeypatch, flags, mode):
    modes: list[str] = []
    monkeypatch.setattr("robustft.training.loop.CompiledTowers", lambda _, mode: nullcontext(modes.append(mode)))
    arguments = ["--model", f"local-dir:{own / 'clip'}", "--output", str(tmp_path / "out"), "--batch-size", "20"]
    assert cli.main(["train", str(own / "photos"), *arguments, "--dry-run", *flags]) == 0
    assert modes == [mode]


def test_a_plain_tree_is_split_and_measured_on_its_own_part(own, tmp_path, monkeypatch):
    monkeypatch.setattr("robustft.pipeline.job.stress", lambda images: stress(images, names=["noise", "blur"]))
    settings = {"model": f"local-dir:{own / 'clip'}", "stress": True, **RATE}
    run = train(own / "photos" / "train", output=tmp_path / "out", **settings)
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["stress"]["models"]) == 2
    splits = [row["split"] for row in csv.DictReader((tmp_path / "out" / "split.csv").open())]
    assert sorted(set(splits)) == ["test", "train", "validation"] and len(splits) == 80
    assert not run.evaluation.shifts and not run.evaluation.ood
    told: list[str] = []
    measured = [evaluate_runs(own / "photos" / "train", [run.folder], log=told.append, progress=False)]
    shutil.copytree(own / "photos" / "train", tmp_path / "moved" / "again")
    measured.append(evaluate_runs(tmp_path / "moved" / "again", [run.folder], log=told.append, progress=False))
    for again in measured:  # on the images that the run held out, wherever the tree lies
        assert again.models["out"].id_accuracy == run.evaluation.models[run.chosen].id_accuracy
        assert again.models["out"].id.calibration.count == splits.count("test")
    kept = splits.count("test")
    left_out = f"{80 - kept} of 80 images are left out, because out was trained or chosen on them"
    assert sum(left_out in line for line in told) == 2
    whole = evaluate_runs(own / "photos" / "train", [run.folder], split="test", log=told.append, progress=False)
    assert whole.models["out"].id_accuracy != measured[0].models["out"].id_accuracy


def test_images_of_a_runs_training_are_no_test_of_it(run, own, tmp_path):
    for folder in (run.folder, run.folder / "model"):
        with pytest.raises(ValueError, match="was trained or chosen on every image of the test set"):
            evaluate_runs(own / "photos" / "train", [folder], log=lambda _: None)
    other = tree(tmp_path / "train", glyphworld.digits("test"), 40)  # other images under the same names
    again = evaluate_runs(other, [run.folder], log=lambda _: None, progress=False)
    assert again.models["run"].id_accuracy == run.evaluation.models[run.chosen].id_accuracy


def test_shards_without_a_list_of_their_images_are_no_test_of_a_run_on_them(run, own, tmp_path):
    shard = tmp_path / "000.tar"
    with tarfile.open(shard, "w") as archive:
        for number, image in enumerate(sorted((own / "photos" / "test").rglob("*.png"))[:4]):
            (tmp_path / "label").write_text(str(number % 2))
            archive.add(image, f"{number}.png")
            archive.add(tmp_path / "label", f"{number}.cls")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": str(shard)}))
    with pytest.raises(ValueError, match="000.tar: run was trained on these data, and has no list of which images"):
        evaluate_runs(shard, [tmp_path / "run"], log=lambda _: None)


@pytest.mark.parametrize(
    "methods",
    exhaustive(["LPFT", "LinearProbe"], {"CoOp": {"options": {"context": 4}}, "TipAdapterF": {}}, ["DRM", "CVaR"]),
)
def test_methods_that_want_more_are_given_it(own, tmp_path, methods):
    (tmp_path / "words.json").write_text(
        json.dumps({name.replace(" ", "_"): list(texts) for name, texts in glyphworld.CONCEPTS.items()})
    )
    descriptions = str(tmp_path / "words.json") if "DRM" in methods else None
    settings = {"model": f"local-dir:{own / 'clip'}", "methods": methods, "descriptions": descriptions, **RATE}
    run = train(own / "photos", output=tmp_path / "out", **settings)
    assert set(methods) <= set(run.evaluation.models)
    assert robustft.load(run.folder)(next((own / "photos" / "ood" / "letters").iterdir())).label


@pytest.mark.parametrize("score", exhaustive("knn", "mahalanobis"))
def test_a_score_that_learns_does_so_from_the_training_images(own, tmp_path, score):
    settings = {"model": f"local-dir:{own / 'clip'}", "methods": ["LinearProbe"], "ensemble": "none", **RATE}
    run = train(own / "photos", output=tmp_path / "out", score=score, sets="none", **settings)
    assert 0.0 < run.evaluation.models["model"].auroc < 1.0
    assert not run.evaluation.models["zero-shot"].ood and run.evaluation.score == score
    pipeline = robustft.load(run.folder)
    parts = robustft.data.open(own / "photos").map(lambda part: part.with_transform(pipeline.transform))
    found = {name: pipeline.predictor.predict(part, labelled="ood" not in name) for name, part in parts.sets().items()}
    by_hand = robustft.Detector(score).fit(found["train"], validation=found["validation"])
    assert pipeline.detector.threshold_ == pytest.approx(by_hand.threshold_, abs=1e-5)
    scores = by_hand.scores(found["ood/letters"])
    files = [file for file, _ in parts.ood["letters"].samples]
    assert [one.ood_score for one in pipeline(files)] == pytest.approx(scores.tolist(), abs=1e-5)
    rows = [row for row in csv.DictReader((run.folder / "predictions.csv").open()) if row["set"] == "ood/letters"]
    assert [float(row["ood_score"]) for row in rows] == pytest.approx(scores.tolist(), abs=1e-5)


def test_options_come_from_a_file_with_flags_above_it(own, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("data: photos\nlr: 0.1\nmethods: [flyp]\nshifts: {night: night}\n")
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--lr", "0.2", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["data"], shown["lr"], shown["methods"]) == ("photos", 0.2, ["flyp"])
    assert shown["shifts"] == {"night": "night"} and shown["tpr"] == 0.95
    for text, message in (("rate: 3", "no option is called 'rate'"), ("lr: fast", "lr is 'fast', expected float")):
        (tmp_path / "run.yaml").write_text(text)
        assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
        assert message in capsys.readouterr().err


def test_a_damaged_image_stops_a_run_or_is_counted(own, tmp_path):
    tree(tmp_path / "photos" / "train", glyphworld.digits("train"), 80)
    test = tree(tmp_path / "photos" / "test", glyphworld.digits("test"), 20)
    broken = sorted(test.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    settings = {"model": f"local-dir:{own / 'clip'}", "methods": ["LinearProbe"], "ensemble": "none", **RATE}
    with pytest.raises(ValueError, match=broken.name):
        train(tmp_path / "photos", output=tmp_path / "raise", **settings)
    with pytest.warns(UserWarning, match="1 of 20 images could not be read"):
        train(tmp_path / "photos", output=tmp_path / "skip", on_bad_image="skip", **settings)
    rows = list(csv.DictReader((tmp_path / "skip" / "predictions.csv").open()))
    assert len(rows) == 19 and str(broken) not in {row["file"] for row in rows}
    assert all(Path(row["file"]).parent.name == row["label"] for row in rows)


@pytest.mark.exhaustive
def test_other_peoples_images_go_through(own, tmp_path, capsys):
    package = pytest.importorskip("conformal_clip_data")  # simulated fabric: nominal, local and global defects
    images = Path(package.__file__).parent / "data" / "textile_images" / "simulated"
    cli.main(["check", str(images)])
    out = capsys.readouterr().out
    assert all(name in out for name in ("global", "local", "nominal")) and "1,600" in out
    model = f"local-dir:{own / 'clip'}"
    arguments = ["train", str(images), "--model", model, "--output", str(tmp_path / "run"), "--method", "linear-probe"]
    assert cli.main([*arguments, "--shots", "200", "--ensemble", "none"]) == 0
    models = Evaluation.from_dict(json.loads((tmp_path / "run" / "metrics.json").read_text())).models
    assert models["LinearProbe"].id_accuracy > models["zero-shot"].id_accuracy + 0.1
    assert cli.main(["predict", str(tmp_path / "run"), str(images / "local"), "--json"]) == 0


@pytest.mark.exhaustive
def test_drawings_of_two_studios_go_through(tmp_path, capsys):
    with zipfile.ZipFile(Path(__file__).parent.parent / "drawings" / "drawings.zip") as archive:
        archive.extractall(tmp_path / "drawings")
    from open_clip.push_to_hf_hub import save_for_hf

    bundle = glyphworld.load_clip()  # as open_clip itself saves a model
    silent = SimpleNamespace(save_pretrained=lambda folder: None)
    save_for_hf(bundle.model, silent, bundle.config["model_cfg"], tmp_path / "clip", True)
    drawings, other = tmp_path / "drawings" / "noto", tmp_path / "drawings" / "shifts" / "fluent"
    cli.main(["check", str(drawings), "--shift", f"fluent={other}"])
    assert "food_prepared" in capsys.readouterr().out
    arguments = ["train", str(drawings), "--model", f"local-dir:{tmp_path / 'clip'}", "--method", "linear-probe"]
    arguments += ["--shift", f"fluent={other}", "--ensemble", "none", "--output", str(tmp_path / "run")]
    assert cli.main([*arguments, "--epochs", "60", "--validate-every", "20"]) == 0
    models = Evaluation.from_dict(json.loads((tmp_path / "run" / "metrics.json").read_text())).models
    probe, zero_shot = models["LinearProbe"], models["zero-shot"]
    drawn_by_others = probe.shifts["fluent"].calibration
    assert drawn_by_others.count == 4 * 34
    assert drawn_by_others.accuracy > zero_shot.shifts["fluent"].calibration.accuracy + 0.1
    assert cli.main(["predict", str(tmp_path / "run"), str(other), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4 * 34


@pytest.mark.parametrize("command", [train, evaluate_runs, check_data])
def test_every_argument_of_a_command_is_a_described_flag(command):
    options, parameters = flags.options_of(command), inspect.signature(command).parameters
    assert set(options) == set(parameters) - {"data", "runs", "log", "progress"}
    assert all(option.help for option in options.values())
    assert set(ImageSets.__annotations__) < set(options) and "where" not in parameters
    with pytest.raises(TypeError, match=rf"{command.__name__}\(\) got an unexpected keyword argument 'csv_image'"):
        command("nowhere", csv_image="file")


def test_methods_are_listed_with_what_they_need(capsys):
    assert cli.main(["train", "--list-methods"]) == 0
    out = capsys.readouterr().out
    assert "DRM: " in out and "needs descriptions of the classes (--descriptions)" in out


def test_images_of_other_modes_and_shapes_are_decided_as_files_or_refused(run, tmp_path):
    pipeline = robustft.load(run.folder)
    sixteen = Image.fromarray((np.random.default_rng(0).random((40, 40)) * 65535).astype(np.uint16))
    sixteen.save(tmp_path / "a.png")
    assert pipeline(sixteen) == pipeline(tmp_path / "a.png")
    with pytest.raises(ValueError, match="several shapes"):
        pipeline([torch.zeros(3, 28, 28), torch.zeros(3, 28, 30)])
    assert robustft.load(run.folder, device="auto").device.type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="top must be at least 1"):
        pipeline.stream([tmp_path / "a.png"], top=0)
