"""`robustft.data.check`: what it says of images made wrong on purpose."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import robustft


def noise(seed, side=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path):
    for part, first in (("train", 0), ("val", 100), ("test", 200)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                noise(first + 10 * label + i).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def kinds(report):
    return {finding.kind for finding in report.findings}


def test_sound_data_are_fine_and_counted(photos):
    report = robustft.data.check(robustft.data.open(photos))
    assert report.fine and not report.findings
    assert report.sizes == {"train": 6, "validation": 6, "test": 6}
    assert report.classes["train"] == {"ant": 3, "bee": 3}
    assert "nothing serious found" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["fine"] is True


def test_damaged_and_odd_files_are_named(photos):
    ant = photos / "train" / "ant"
    (ant / "cut.png").write_bytes((ant / "0.png").read_bytes()[:200])
    (ant / "empty.jpg").write_bytes(b"")
    (ant / "text.jpg").write_text("no image")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(ant / "deep.png")
    noise(1).convert("CMYK").save(ant / "ink.jpg")
    noise(2).convert("P").save(ant / "table.png")
    noise(3).save(ant / "film.gif", save_all=True, append_images=[noise(4)])
    noise(5, 1).save(ant / "dot.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(6).save(ant / "turned.jpg", exif=turned)
    report = robustft.data.check(robustft.data.open(photos))
    assert not report.fine
    by_file = {
        finding.where.rsplit("/", 1)[-1]: finding.kind for finding in report.findings if "copy" not in finding.kind
    }
    assert {by_file.pop(name) for name in ("cut.png", "empty.jpg", "text.jpg")} == {"unreadable"}
    assert (
        by_file.items()
        >= {
            **{"deep.png": "16 bit", "ink.jpg": "CMYK", "table.png": "palette"},
            **{"dot.png": "one pixel wide", "turned.jpg": "turned by EXIF"},
        }.items()
    )
    assert "animated" in kinds(report) and "look at these before you train" in report.table()


def test_copies_across_sets_are_serious_and_within_one_are_not(photos):
    noise(0).save(photos / "test" / "ant" / "same.png")
    noise(1).resize((48, 48)).save(photos / "test" / "ant" / "near.png")
    noise(2).save(photos / "train" / "ant" / "twice.png")
    found = {f.kind: f for f in robustft.data.check(robustft.data.open(photos)).findings}
    assert found["exact copy across sets"].serious and "same.png" in found["exact copy across sets"].where
    assert "near.png" in found["near copy across sets"].where
    assert not found["exact copy within a set"].serious


def test_names_that_make_poor_captions_are_told(tmp_path):
    for name in ("n01440764", "class_01", "Polar bear", "polar_bear"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            noise(hash(name) % 1000 + i).save(tmp_path / "train" / name / f"{i}.png")
    report = robustft.data.check(robustft.data.open(tmp_path))
    assert sum(f.kind == "class name that is no word" for f in report.findings) == 2
    assert "class names alike" in kinds(report)


def test_workers_find_what_one_process_finds(photos):
    (photos / "train" / "ant" / "cut.png").write_bytes(b"\x89PNG")
    data = robustft.data.open(photos)
    seen = []
    report = robustft.data.check(data, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert report == robustft.data.check(data)
    assert seen[-1] == (19, 19)
