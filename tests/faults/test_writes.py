"""A fault at every write, sync and rename of whatever is written: what was there, or what is to be, and a resume."""

from __future__ import annotations

import os
import shutil
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from faulty import FAULTS, fails_at
from matplotlib.figure import Figure
from tiny_clip import CONFIG, NAMES

from robustft import calibration, clip, methods
from robustft.detection import Detector
from robustft.ensembles import OutputEnsemble, Tempering
from robustft.evaluation import evaluate_predictions, pictures
from robustft.evaluation.report import write_report
from robustft.evaluation.results import Suite
from robustft.files import clear_unfinished, is_unfinished
from robustft.neighbors import NeighborIndex
from robustft.predictors import Classifier, DualClassifier
from robustft.training import fit, run
from robustft.training.checkpoint import discard_unfinished, latest_checkpoint, save_checkpoint


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_is_that_before_or_the_new_one(tmp_path, fault):
    states = [{"method.a": torch.full((3,), float(step))} for step in range(2)]
    for number in range(100):
        folder = tmp_path / str(number)
        save_checkpoint(folder, 0, states[0], {})
        failed = fails_at(number, fault, lambda folder=folder: save_checkpoint(folder, 1, states[1], {}))
        if fault != "kill":
            assert all(path.name.startswith("step_") for path in folder.iterdir()), number
        found = latest_checkpoint(folder)
        assert torch.equal(found.tensors["method.a"], states[found.step]["method.a"])
        discard_unfinished(folder)
        assert not any(map(is_unfinished, folder.iterdir()))
        assert failed or found.step == 1
        save_checkpoint(folder, 1, states[1], {})
        assert latest_checkpoint(folder).step == 1
        if not failed:
            break
    assert 5 < number < 99


@pytest.mark.parametrize("fault", FAULTS)
def test_a_feature_cache_is_whole_or_absent(tmp_path, fault, clip_model):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    expected = clip.encode(clip_model, images)
    for number in range(100):
        cache = tmp_path / str(number)
        failed = fails_at(number, fault, lambda cache=cache: clip.encode(clip_model, images, cache=cache))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a damaged file
            found = clip.encode(clip_model, images, cache=cache)
        assert torch.equal(found.image_features, expected.image_features)
        assert fault == "kill" or not any(map(is_unfinished, cache.iterdir()))
        if not failed:
            break
    assert 2 < number < 99


def test_a_checkpoint_that_a_kill_left_to_be_removed_is_removed_on_resume(tmp_path):
    for step in range(4):
        path = save_checkpoint(tmp_path, step, {"method.a": torch.ones(1)}, {})
    path.with_name("step_00000000").mkdir()  # half removed
    discard_unfinished(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_what_kills_left_in_a_runs_folder_goes_and_what_was_to_be_replaced_comes_back(tmp_path):
    for name in (".a.0123456789ab/b", "export/.x.0123456789ab.old/w", "export/.y.0123456789ab.old/w", "export/y/w"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".f.json.0123456789ab").write_text("{")
    (tmp_path / ".mine").write_text("")
    clear_unfinished(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {".mine", "export/x/w", "export/y/w"}
    assert (tmp_path / "export/y/w").read_text() == "export/y/w"


# Whatever has a `save`: how the one of a seed is written


def outputs_of(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 3
    logits = torch.randn(60, 3, generator=generator) + torch.nn.functional.one_hot(labels)
    features = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    return clip.Outputs(features, logits.sigmoid(), logits, labels=labels)


def vrf_of(seed):
    outputs = outputs_of(seed)
    better = 2.0 * torch.nn.functional.one_hot(outputs.labels) * (torch.arange(60) % 2)[:, None]
    data = methods.VRFFeatures(outputs.only("logits"), outputs.replace(logits=outputs.logits + better))
    return methods.VRF(temperatures=(1.2, 0.8)).fit(data, data)


@cache
def model_of(seed):
    torch.manual_seed(seed)
    cfg = CONFIG["model_cfg"]
    model = clip.import_open_clip().CLIP(cfg["embed_dim"], dict(cfg["vision_cfg"]), dict(cfg["text_cfg"]))
    return model.eval()


def head_of(seed):
    return Classifier(model_of(seed), torch.randn(3, 8), NAMES, logit_scale=5.0)


def dual_of(seed):
    return DualClassifier(model_of(seed), torch.randn(3, 8), torch.ones(3, 8), NAMES, logit_scale=5.0)


def predictor(make):
    @cache
    def made(seed):
        torch.manual_seed(seed)
        return make(seed)

    return lambda seed, path: made(seed).save(path, CONFIG)


def report(seed, path):
    suite = Suite(outputs_of(seed), {"night": outputs_of(seed)}, {})
    write_report(path, evaluation=evaluate_predictions({"model": suite}))


SAVES = {
    "model": lambda seed, path: clip.export(model_of(seed), path, CONFIG),
    "classifier": predictor(head_of),
    "dual": predictor(dual_of),
    "mixture": predictor(lambda seed: OutputEnsemble(head_of(seed), dual_of(seed)).at(0.3)),
    "tempered": predictor(lambda seed: Tempering(dual_of(seed)).at(2.0)),
    "VRF of two": predictor(lambda seed: vrf_of(seed).classifier(head_of(seed), dual_of(seed))),
    "VRF": lambda seed, path: vrf_of(seed).save(path),
    "detector": lambda seed, path: Detector("knn").fit(outputs_of(seed), validation=outputs_of(seed)).save(path),
    "calibrator": lambda seed, path: (
        calibration.VectorScaling().fit(outputs_of(seed).logits, outputs_of(seed).labels).save(path)
    ),
    "index": lambda seed, path: NeighborIndex(outputs_of(seed).features).save(path),
    "report": report,
}


def content(path):
    """The bytes of a file, or of each file in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


FOLDERS = ("model",)  # under each fault, the others under one, folders in folders under three of them
CASES = [
    (kind, fault)
    for place, kind in enumerate(SAVES)
    for fault in (FAULTS if kind in FOLDERS else FAULTS[place % 3 :][:1])
]
PLAIN = (("calibrator", FAULTS[list(SAVES).index("calibrator") % 3]),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "fault"), [pytest.param(*case, marks=() if case in PLAIN else pytest.mark.exhaustive) for case in CASES]
)
def test_what_is_saved_over_another_is_that_or_the_new_one(tmp_path, monkeypatch, kind, fault):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # which no killed process can tell, and which takes time
    for name in ("frontier", "reliability", "scores"):  # of a report, drawn blank
        monkeypatch.setattr(pictures, name, lambda *_: Figure(figsize=(1, 1)))
    save, path, before = SAVES[kind], tmp_path / "saved", tmp_path / "before"
    save(1, path)
    new = content(path)
    _remove(path)
    save(0, path)
    old = content(path)
    assert old != new and old.keys() == new.keys()
    (shutil.copytree if path.is_dir() else shutil.copy)(path, before)
    for number in range(200):
        failed = fails_at(number, fault, lambda: save(1, path))
        if path.exists() and kind == "report":  # of several files, each whole
            assert all(data in (old[name], new[name]) for name, data in content(path).items() if name in old), number
        elif path.exists():
            assert content(path) in (old, new), number
        else:  # a kill between the two renames of a folder leaves the earlier one beside it
            assert fault == "kill"
        if fault != "kill":
            assert not any(map(is_unfinished, tmp_path.rglob("*"))), number
        clear_unfinished(tmp_path)
        assert path.exists() and (kind == "report" or content(path) in (old, new)), number
        save(1, path)
        assert content(path) == new
        if not failed:
            break
        _remove(path)
        (shutil.copytree if before.is_dir() else shutil.copy)(before, path)
    assert 2 < number < 199


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=pytest.mark.exhaustive) for fault in FAULTS])
def test_a_training_with_a_fault_at_any_write_is_resumed_to_the_same_bits(
    tmp_path, fault, clip_model, prompts, batches, monkeypatch
):
    data = tuple(torch.cat(column)[:8] for column in zip(*batches[:2], strict=True))

    def append_line(path, line, original=run.append_line):
        """A line is written in two parts, so that a fault at the second cuts it short."""
        with path.open("ab") as file:
            half = len(line) // 2
            file.write(line[:half].encode())
            file.flush()
            Path.write_bytes(path.with_name("other"), b"")  # what counts as a write
            file.write(f"{line[half:]}\n".encode())

    monkeypatch.setattr(run, "append_line", append_line)
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def trained(folder):
        method = methods.FineTune(clip_model, **prompts)
        fit(method, data, epochs=2, batch_size=4, lr=1e-3, progress=False, log_every=1, output=folder,
            resume=run.holds_run(folder))  # fmt: skip
        return method.state_dict(), (folder / "metrics.jsonl").read_text()

    expected, records = trained(tmp_path / "whole")
    for number in range(0, 300, 1 if fault == "kill" else 3):
        folder = tmp_path / str(number)
        failed = fails_at(number, fault, lambda folder=folder: trained(folder))
        state, found = trained(folder)
        assert all(torch.equal(value, state[name]) for name, value in expected.items()), number
        assert found == records, number
        if not failed:
            break
    assert 30 < number < 299
