"""Data on disk: every kind of source that `robustft.data.open` knows, on images made here."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import robustft
from robustft.data.families import imagenet_synsets
from robustft.data.opening import Data, stratified
from robustft.data.paths import UNLABELLED, PathDataset
from robustft.data.table import Columns

CLASSES = ("ant", "bee", "cow")


def picture(seed, side=12):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


def tree(root, count=10, classes=CLASSES, first=0):
    for label, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i}.png", first + 1000 * label + i)
    return root


def files(dataset):
    return [str(file) for file, _ in dataset.samples]


def test_a_folder_of_sets_is_read_as_it_stands(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "valid", 2, first=100)
    tree(tmp_path / "test", 3, first=200)
    tree(tmp_path / "shifts" / "night", 2, CLASSES[:2], first=300)
    save(tmp_path / "ood" / "other" / "flat.png", 400)
    save(tmp_path / "ood" / "nested" / "x" / "deep.png", 401)
    data = robustft.data.open(tmp_path)
    assert data.classes == CLASSES
    assert {name: len(part) for name, part in data.sets().items()} == {
        **{"train": 30, "validation": 6, "test": 9},
        **{"shifts/night": 4, "ood/nested": 1, "ood/other": 1},
    }
    assert data.shifts["night"].classes == CLASSES[:2]
    assert data.ood["other"].samples[0][1] == UNLABELLED
    image, label = data.train[29]
    assert label == 2 and np.array_equal(image, picture(2009))
    assert "a folder of sets" in data.describe() and "3 classes: 'ant', 'bee', 'cow'" in data.describe()


def test_without_a_validation_set_the_same_share_of_every_class_is_held_out_by_seed(tmp_path):
    tree(tmp_path / "train", 20)
    first, second, other = (robustft.data.open(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert files(first.validation) == files(second.validation) != files(other.validation)
    assert first.validation.counts() == dict.fromkeys(CLASSES, 2) and len(first.train) == 54
    assert not set(files(first.train)) & set(files(first.validation))
    assert "held out by seed 3" in first.describe()


def test_a_tree_is_split_with_copies_on_one_side_and_its_table_is_a_source(tmp_path):
    root = tree(tmp_path / "tree", 20)
    for i in range(8):  # of one ant: an exact copy, and near ones (brighter, recompressed)
        copy = picture(0) if i == 0 else Image.eval(picture(0), lambda v, i=i: min(255, v + i))
        copy.save(root / "ant" / f"copy{i}.png")
    data = robustft.data.open(root, seed=1)
    sets = data.sets()
    assert sum(map(len, sets.values())) == 68 and set(sets) == {"train", "validation", "test"}
    holding = {
        name for name, part in sets.items() for file in files(part) if "copy" in file or file.endswith("ant/0.png")
    }
    assert len(holding) == 1
    assert "8 (near-)copies" in data.describe()
    (tmp_path / "split.csv").write_text(data.split_table())
    again = robustft.data.open(tmp_path / "split.csv", images=root)
    assert {name: files(part) for name, part in again.sets().items()} == {n: files(p) for n, p in sets.items()}
    assert again.classes == data.classes


def test_tables_are_read_by_the_names_people_use_and_by_named_columns(tmp_path):
    for i in range(6):
        save(tmp_path / "images" / f"{i}.png", i)
    rows = [(f"images/{i}.png", f"a photo, number {i}", CLASSES[i % 3], "train" if i < 3 else "test") for i in range(6)]
    table = tmp_path / "open_clip.csv"  # tabs in a .csv, as open_clip writes
    table.write_text("\n".join("\t".join(row) for row in [("filepath", "title", "label", "split"), *rows]) + "\n")
    data = robustft.data.open(table)
    assert len(data.test) == 3 and data.classes == CLASSES
    item = data.test[0]
    assert item["text"] == "a photo, number 3" and item["label"] == 0 and np.array_equal(item["image"], picture(3))

    other = tmp_path / "other.csv"
    other.write_text(
        "pic,kind,place,light\n" + "".join(f"images/{i}.png,{i % 2},p{i % 2},l{i // 3}\n" for i in range(6))
    )
    data = robustft.data.open(other, columns=Columns(image="pic", label="kind", groups=("place", "light")))
    assert data.classes == ("0", "1")
    assert data.train.group_names == ("p0 x l0", "p0 x l1", "p1 x l0", "p1 x l1")
    assert set(data.train[0]) == {"image", "label", "group"}


def test_a_caption_table_has_no_labels(tmp_path):
    save(tmp_path / "a.png", 0)
    (tmp_path / "captions.tsv").write_text("filepath\ttitle\na.png\tan ant\n")
    data = robustft.data.open(tmp_path / "captions.tsv")
    assert data.classes == () and data.validation is None
    assert set(data.train[0]) == {"image", "text"}


def test_a_wilds_table_is_known_by_its_columns(tmp_path):
    for i in range(8):
        save(tmp_path / "train" / f"{i}.png", i)
    splits = ["train"] * 4 + ["id_val", "id_test", "val", "test"]
    lines = [f"{i}.png,{i % 2},{i // 4},{split}" for i, split in enumerate(splits)]
    (tmp_path / "metadata.csv").write_text("filename,y,location_remapped,split\n" + "\n".join(lines) + "\n")
    data = robustft.data.open(tmp_path)
    assert "WILDS' iWildCam" in data.describe()
    assert {name: len(part) for name, part in data.sets().items()} == {
        **{"train": 4, "validation": 1, "test": 1},
        **{"shifts/val": 1, "shifts/test": 1},
    }
    assert data.train.groups.tolist() == [0] * 4


def test_a_hugging_face_image_folder_takes_its_metadata(tmp_path):
    save(tmp_path / "a.png", 0)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "an ant"}) + "\n")
    assert robustft.data.open(tmp_path).train[0]["text"] == "an ant"


def test_prompt_learners_split_files(tmp_path):
    rows = [[save(tmp_path / f"{i}.png", i).name, i % 2, CLASSES[i % 2]] for i in range(6)]
    (tmp_path / "split_zhou_X.json").write_text(json.dumps({"train": rows[:2], "val": rows[2:4], "test": rows[4:]}))
    data = robustft.data.open(tmp_path / "split_zhou_X.json")
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 2, 2) and data.classes == CLASSES[:2]


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(seed):
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def test_shards_are_read_in_place_and_counted_first(tmp_path):
    for number in range(2):
        samples = []
        for i in range(4):
            samples += [(f"{i:03}.png", png(10 * number + i)), (f"{i:03}.cls", str(i % 2).encode())]
        shard(tmp_path / f"{number:03}.tar", samples)
    data = robustft.data.open(str(tmp_path / "{000..001}.tar"))
    train = torch.utils.data.ConcatDataset([data.train, data.validation])
    assert len(train) == 8 and data.classes == ("0", "1")
    assert any(np.array_equal(image, picture(13)) and label == 1 for image, label in train)
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing: .*002.tar"):
        robustft.data.open(str(tmp_path / "{000..002}.tar"))
    shard(tmp_path / "text.tar", [("a.png", png(1)), ("a.txt", b"an ant\n")])
    assert robustft.data.open(str(tmp_path / "text.tar")).train[0]["text"] == "an ant"
    shard(tmp_path / "bad.tar", [("a.png", png(1)), ("a.cls", b"ant")])
    with pytest.raises(ValueError, match="bad.tar: the label of 'a' is b'ant'"):
        robustft.data.open(str(tmp_path / "bad.tar"))
    (tmp_path / "torn.tar").write_bytes((tmp_path / "000.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="torn.tar: damaged"):
        robustft.data.open(str(tmp_path / "torn.tar"))


def test_imagenet_and_its_shifts_meet_by_synset(tmp_path):
    synsets = imagenet_synsets()
    tree(tmp_path / "train", 2, synsets[:6])
    tree(tmp_path / "r", 1, (synsets[4], synsets[1]))
    data = robustft.data.open(tmp_path, shifts={"r": tmp_path / "r"})
    assert data.classes == synsets[:6] and data.shifts["r"].classes == (synsets[1], synsets[4])
    alone = robustft.data.open(tmp_path / "r")
    assert alone.train is None and len(alone.test) == 2 and "2 of ImageNet's 1000" in alone.protocols["test"]
    renamed = robustft.data.open(tmp_path, class_names=dict(zip(synsets, map(str, range(1000)), strict=True)))
    assert renamed.classes == tuple(map(str, range(6)))


def test_imagenet_v2_counts_its_folders_as_numbers(tmp_path):
    tree(tmp_path, 1, tuple(map(str, range(1000))))
    data = robustft.data.open(tmp_path)
    assert data.classes == imagenet_synsets() and data.test.samples[2][0].parent.name == "2"


def test_hugging_face_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [picture(i) for i in range(6)], "label": [0, 1, 2] * 2}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(tmp_path / "saved")
    data = robustft.data.open(tmp_path / "saved")
    assert data.classes == CLASSES and len(data.train) + len(data.validation) == 6


def test_names_shots_and_further_sets(tmp_path):
    tree(tmp_path / "photos" / "train", 6)
    tree(tmp_path / "photos" / "test", 2, first=50)
    tree(tmp_path / "night", 2, ("cow", "ant"), first=70)
    save(tmp_path / "other" / "x.png", 90)
    names = {"ant": "an ant", "bee": "a bee", "cow": "a cow"}
    data = robustft.data.open(
        tmp_path / "photos",
        shifts={"night": tmp_path / "night"},
        ood={"other": tmp_path / "other"},
        class_names=names,
        shots=2,
    )
    assert data.classes == ("an ant", "a bee", "a cow") and data.shifts["night"].classes == ("an ant", "a cow")
    assert data.train.counts() == dict.fromkeys(data.classes, 2)
    assert robustft.data.open(tmp_path / "photos", class_names=["x", "y", "z"]).test.classes == ("x", "y", "z")
    with pytest.raises(ValueError, match="class_names holds 2 names for 3 classes"):
        robustft.data.open(tmp_path / "photos", class_names=["x", "y"])
    with pytest.raises(ValueError, match="class_names has no name for 'cow'"):
        robustft.data.open(tmp_path / "photos", class_names={"ant": "x", "bee": "y"})
    assert isinstance(robustft.data.open(data), Data)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: root / "absent", "absent: no such file or folder"),
        (lambda root: root, "no data set that is known.*a folder train/.*The folder holds"),
        (lambda root: save(root / "a.png", 0), "a.png: a file of no known kind"),
        (lambda root: write(root / "t.csv", "filepath,label\n"), "t.csv: a header without rows"),
        (lambda root: write(root / "t.csv", "a,b\nx,y\n"), "t.csv: no column for the image"),
        (lambda root: write(root / "t.csv", "filepath,other\nx,y\n"), "t.csv: neither a label .* nor a caption"),
        (lambda root: write(root / "t.csv", "filepath,label\nx\n"), "t.csv: line 2 has 1 fields, the header 2"),
        (lambda root: write(root / "t.csv", "filepath,label,split\nx,0,dev\n"), "t.csv: 1 rows have the split 'dev'"),
        (lambda root: write(root / "t.csv", "filepath,label\nx,1000000000\n"), "t.csv: labels reach 1000000000"),
        (lambda root: write(root / "t.csv", b"filepath,label\n\xff,1\n"), "t.csv: no UTF-8 text"),
        (lambda root: mixed(root / "train"), "images lie beside the class folders"),
        (lambda root: empty_class(root), "holds no images; a class needs some"),
        (lambda root: two_validation_sets(root), "holds val/ and valid/"),
    ],
)
def test_errors_name_the_file_and_what_was_expected(tmp_path, make, message):
    source = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        robustft.data.open(source)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def mixed(folder):
    tree(folder, 1)
    save(folder / "loose.png", 5)
    return folder.parent


def empty_class(root):
    tree(root / "train", 1)
    (root / "train" / "dog").mkdir()
    return root


def two_validation_sets(root):
    for name in ("train", "val", "valid"):
        tree(root / name, 1)
    return root


def test_hidden_files_are_no_images_and_order_does_not_depend_on_the_disk(tmp_path):
    tree(tmp_path / "train", 3)
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"x")
    data = robustft.data.open(tmp_path)
    assert not any("._" in file for part in data.sets().values() for file in files(part))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_stratified_keeps_families_together_and_every_class_on_both_sides(share):
    labels = torch.arange(3).repeat_interleave(40)
    family = torch.arange(120) // 3 * 3
    first, second = stratified(labels, share, 0, family)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(120))
    assert not set(family[first].tolist()) & set(family[second].tolist())
    for label in range(3):
        assert 0 < (labels[second] == label).sum() <= round(40 * share) + 2


def test_the_only_image_of_a_class_is_not_held_out():
    first, second = stratified(torch.tensor([0, 0, 1]), 0.1, 0)
    assert 2 in first.tolist() and len(second) == 1


def test_path_datasets_tell_themselves_from_others(tmp_path):
    a, b = save(tmp_path / "a.png", 0), save(tmp_path / "b.png", 1)
    one = PathDataset(((a, 0), (b, 1)), ("ant", "bee"))
    assert one.fingerprint == PathDataset(((a, 0), (b, 1)), ("ant", "bee")).fingerprint
    others = [
        one.subset([0]),
        one.subset([1, 0]),
        one.renamed({"ant": "x", "bee": "y"}),
        one.relabelled(("bee", "ant")),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert one.relabelled(("bee", "ant")).labels.tolist() == [1, 0]
