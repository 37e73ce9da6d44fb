"""A slice of `benchmarks.fuzz_loaders`: every loader of damaged files loads or names the file, and that is all;
and what was loaded from a file does not change with it."""

from __future__ import annotations

import os
import random
import struct
import tarfile
from io import BytesIO

import pytest
import torch
from damage import change

import robustft
from benchmarks import fuzz_loaders
from robustft import calibration, clip
from robustft.calibration.calibrators import load as load_calibrator
from robustft.data.shards import read_shards
from robustft.evaluation.results import read_evaluation
from robustft.neighbors import NeighborIndex


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_load_or_are_refused_by_name():
    counts, failures = fuzz_loaders.fuzz(files := 200)
    assert failures == []
    assert sum(count.total() for count in counts.values()) == files


def test_the_fuzzer_sees_what_a_loader_must_not_do(tmp_path):
    path = tmp_path / "file"

    def raises(error):
        raise error

    def judged(load, exact=False):
        return fuzz_loaders.judge(fuzz_loaders.Loader(path, load, exact), 1, tmp_path)

    assert judged(lambda: 1) == judged(lambda: 1, True) == "loaded"
    assert judged(lambda: 2, True) == "loads something else"
    assert judged(lambda: raises(ValueError(f"{path}: no"))) == "refused"
    assert judged(lambda: raises(ValueError("no"))).startswith("does not name the file")
    assert judged(lambda: raises(KeyError("a"))).startswith("KeyError")


def test_every_way_of_damage_changes_files():
    data = b'{"a": [1, 2]}'
    assert len({fuzz_loaders.mutate(data, random.Random(i)) for i in range(100)}) > 50


CUT = """
import os, sys, torch
from robustft import NeighborIndex
index = NeighborIndex.load(sys.argv[1])
before = index.nearest(index.points[:5], 3)
os.truncate(sys.argv[1], 0)
after = index.add(torch.zeros(0, 8)).nearest(index.points[:5], 3)
assert all(map(torch.equal, before, after))
print("same")
"""


@pytest.mark.exhaustive
def test_an_index_outlives_its_file(tmp_path, python):
    """Mapped, it would kill its process with SIGBUS."""
    NeighborIndex(torch.randn(5000, 8)).save(tmp_path / "index")
    run = python.run("-c", CUT, tmp_path / "index")
    assert run.stdout.strip() == "same", (run.returncode, run.stderr)


def test_what_is_loaded_does_not_change_with_its_file(tmp_path):
    points = torch.randn(50, 8)
    NeighborIndex(points).save(tmp_path / "index")
    index = NeighborIndex.load(tmp_path / "index")
    size = os.path.getsize(tmp_path / "index")
    with open(tmp_path / "index", "r+b") as file:
        file.write(bytes(size))
    assert torch.equal(index.points, points)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "temperature must be a positive number"),
        ("temperature", torch.inf, "temperature must be finite"),
        ("temperature", torch.ones(2, dtype=torch.float64), "temperature must be a positive number"),
        ("temperature", torch.ones(()), "float64"),
        ("classes", 0, "number of classes"),
        ("classes", "3", "number of classes"),
        ("type", "Other", "Other"),
    ],
)
def test_a_calibrator_of_impossible_values_is_refused_with_the_files_name(tmp_path, name, value, message):
    labels = torch.arange(60) % 3
    logits = torch.eye(3)[labels] + torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    path = calibration.TemperatureScaling().fit(logits, labels).save(tmp_path / "it.safetensors")
    load_calibrator(path)
    change(path, name, value)
    with pytest.raises(ValueError, match=f"it.safetensors: .*{message}"):
        load_calibrator(path)


def test_a_feature_cache_with_one_bit_changed_is_written_anew(tmp_path, clip_model):
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6)
    first = clip.encode(clip_model, images, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match="is damaged"):
            again = clip.encode(clip_model, images, cache=tmp_path)
        assert torch.equal(again.image_features, first.image_features) and torch.equal(again.labels, first.labels)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("label", "message"),
    [("1e400", "whole number"), ("1.5", "whole number"), (str(10**9), "less than"), ('"x"', "whole number")],
)
def test_a_shards_impossible_label_is_refused_at_once(tmp_path, label, message):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, value in (("0.jpg", b""), ("0.json", f'{{"label": {label}}}'.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(value)
            archive.addfile(info, BytesIO(value))
    with pytest.raises(ValueError, match=f"a.tar: the label of '0' is .*{message}"):
        read_shards(str(tmp_path / "a.tar"))


def test_a_model_too_large_for_its_weights_is_refused_before_it_is_built(tmp_path):
    open_clip = clip.import_open_clip()
    settings = fuzz_loaders.CONFIG["model_cfg"]
    model = open_clip.CLIP(settings["embed_dim"], dict(settings["vision_cfg"]), dict(settings["text_cfg"]))
    for part, name, value in (("text_cfg", "vocab_size", 10**6), ("vision_cfg", "layers", 10**9)):
        folder = clip.export(model, tmp_path / name, fuzz_loaders.CONFIG)
        text = (folder / clip.CONFIG_FILE).read_text()
        old = settings[part][name]
        (folder / clip.CONFIG_FILE).write_text(text.replace(f'"{name}": {old}', f'"{name}": {value}'))
        with pytest.raises(ValueError, match=f"{clip.CONFIG_FILE}: damaged, or open_clip builds no model"):
            clip.load(f"local-dir:{folder}")


def test_an_evaluation_that_is_none_is_refused_by_name(tmp_path):
    for content in (b"[]", b"{}", b'{"models": [{"model": "a"}]}', b"\xff", struct.pack("<Q", 1)):
        (tmp_path / "metrics.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics.json: "):
            read_evaluation(tmp_path / "metrics.json")


def test_one_wrong_bit_in_a_fitted_object_is_refused_with_the_files_name(tmp_path):
    saved = (
        robustft.TemperatureScaling()
        .fit(torch.randn(20, 3), torch.arange(20) % 3)
        .save(tmp_path / "calibrator.safetensors")
    )
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="calibrator.safetensors: .*another checksum than it holds"):
        load_calibrator(saved)
