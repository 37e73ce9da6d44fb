"""Few-shot subsets and split files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from robustft.clip.features import encode
from robustft.data import few_shot, glyphworld, read_split
from robustft.data.sources import fingerprint
from robustft.data.splits import few_shot_indices

LABELS = torch.tensor([0, 2, 1, 0, 1, 2, 0, 0, 2, 1, 1, 0])


def test_subsets_are_balanced_in_order_and_a_function_of_the_seed():
    rows = few_shot_indices(LABELS, 2, seed=3)
    assert torch.equal(LABELS[rows].bincount(), torch.full((3,), 2))
    assert torch.equal(rows, rows.sort().values) and len(rows.unique()) == 6
    assert torch.equal(rows, few_shot_indices(LABELS.tolist(), 2, seed=3))
    assert len({tuple(few_shot_indices(LABELS, 2, seed=seed).tolist()) for seed in range(8)}) > 4


def test_fewer_shots_are_a_subset_of_more():
    one, two, three = (set(few_shot_indices(LABELS, shots, seed=1).tolist()) for shots in (1, 2, 3))
    assert one < two < three


def test_every_sample_of_a_class_is_drawn_about_as_often():
    counts = torch.zeros(len(LABELS))
    for seed in range(300):
        counts[few_shot_indices(LABELS, 1, seed=seed)] += 1
    expected = 300 / LABELS.bincount()[LABELS]
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_every_kind_of_data_gives_the_same_subset_in_its_own_kind():
    images = torch.arange(12.0)[:, None, None, None].expand(-1, 3, 2, 2)
    rows = few_shot_indices(LABELS, 2)
    subset = few_shot((images, LABELS), 2)
    assert torch.equal(subset[0], images[rows]) and torch.equal(subset[1], LABELS[rows])
    dataset = torch.utils.data.TensorDataset(images, LABELS)
    dataset.targets = LABELS.tolist()
    assert few_shot(dataset, 2).indices == rows.tolist()
    digits = glyphworld.digits("train")
    few = few_shot(digits, 16)
    assert torch.equal(few.labels.bincount(), torch.full((10,), 16)) and few.classes == digits.classes
    assert np.array_equal(few.images, digits.images[few_shot_indices(digits.labels, 16).numpy()])


def test_all_samples_of_a_class_that_has_fewer_are_taken_when_asked():
    labels = torch.tensor([0] * 9 + [1] * 4)
    rows = few_shot_indices(labels, 5, at_most=True)
    assert labels[rows].bincount().tolist() == [5, 4] and rows[-4:].tolist() == [9, 10, 11, 12]
    assert torch.equal(rows[:5], few_shot_indices(labels[:9], 5))
    with pytest.raises(ValueError, match="class 1 has 0 samples"):
        few_shot_indices(torch.tensor([0, 2]), 5, at_most=True)


def test_what_cannot_be_balanced_is_refused_by_name():
    with pytest.raises(ValueError, match=r"class 1 has 4 samples, fewer than the 5 asked for"):
        few_shot_indices(torch.tensor([0] * 9 + [1] * 4), 5)
    digits = glyphworld.digits("train").subset(range(30))
    with pytest.raises(ValueError, match=r"class \d \('the digit \w+'\) has"):
        few_shot(digits, 16)
    for labels in (torch.tensor([0.5]), torch.zeros(0, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="labels must be integers"):
            few_shot_indices(labels, 1)
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        few_shot((torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)), 0)
    with pytest.raises(TypeError, match="list"):
        few_shot([1, 2, 3], 1)


ROWS = {
    "train": [["cat/1.png", 1, "cat"], ["ant/1.png", 0, "ant"], ["cat/2.png", 1, "cat"]],
    "val": [["ant/2.png", 0, "ant"]],
    "test": [["bee/1.png", 2, "bee"]],
}


@pytest.fixture
def split(tmp_path):
    def write(content):
        path = tmp_path / "split_zhou_Zoo.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), errors="surrogateescape")
        return path

    return write


def test_a_split_gives_datasets_with_the_class_names_in_label_order(split, tmp_path):
    for i, (file, *_) in enumerate(row for part in ROWS.values() for row in part):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("L", (5, 4), color=40 * i).save(tmp_path / file)
    train, val, test = read_split(split(ROWS), tmp_path, lambda image: torch.tensor(image.getpixel((0, 0))))
    assert train.classes == val.classes == test.classes == ("ant", "cat", "bee")
    assert [len(part) for part in (train, val, test)] == [3, 1, 1]
    assert [(pixel.tolist(), label) for pixel, label in (train[i] for i in range(3))] == [
        ([0, 0, 0], 1),
        ([40, 40, 40], 0),
        ([80, 80, 80], 1),
    ]
    with pytest.raises(ValueError, match=r"class 2 \('bee'\) has 0 samples"):
        few_shot(train, 1)
    assert train.subset([2, 1]).samples == (train.samples[2], train.samples[1])
    assert fingerprint(train) != fingerprint(val)
    assert read_split(split({part: ROWS[part] for part in ("train", "test")}), tmp_path).val.samples == ()


def test_a_split_can_be_encoded(split, tmp_path):
    bundle = glyphworld.load_clip()
    digits = glyphworld.digits("test").subset(range(3))
    for i, image in enumerate(digits.images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    rows = [[f"{i}.png", i, f"name {i}"] for i in range(3)]
    data = read_split(split({"train": rows, "test": rows}), tmp_path, bundle.eval_transform).test
    features = encode(bundle.model, data)
    torch.testing.assert_close(features.image_features, encode(bundle.model, digits).image_features)
    assert features.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object with the lists train, val, test, got list"),
        ({"train": []}, r"got \['train'\]"),
        ({**ROWS, "extra": []}, "extra"),
        ({**ROWS, "val": [["a.png", 0]]}, r"val\[0\] is \['a.png', 0\]; expected \[path, label, class name\]"),
        ({**ROWS, "val": [["a.png", True, "ant"]]}, r"val\[0\]"),
        ({**ROWS, "val": [["a.png", -1, "ant"]]}, r"val\[0\]"),
        ({**ROWS, "val": [["../a.png", 0, "ant"]]}, "does not lie below root"),
        ({**ROWS, "val": [["a.png", 0, "bee"]]}, "label 0 is 'ant' and, for 'a.png', 'bee'"),
        ({**ROWS, "val": [["a.png", 3, "bee"]]}, "class 'bee' has label 3 and, for 'bee/1.png', 2"),
        ({**ROWS, "val": [["a.png", 4, "dog"]]}, r"no sample has label 3 \(1 of 5\)"),
        ({**ROWS, "val": [["a.png", 10**15, "dog"]]}, r"no sample has label 3 \(999999999999997 of 1000000000000001\)"),
        ({"train": [], "test": []}, "no sample has label 0"),
        ({**ROWS, "val": {"a.png": 0}}, r"val is \{'a.png': 0\}; expected a list"),
        ({**ROWS, "val": None}, "val is None; expected a list"),
        ('{"train": [], "test": [], "train": []}', "duplicate keys 'train'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"train": [["\udce9", 0, "ant"]], "test": []}', "no UTF-8 text"),
    ],
)
def test_gaps_and_contradictions_are_refused_by_name(split, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_split(split(content), tmp_path)
