"""Corrupted test images: the same for the same seed, worse with severity, and otherwise the data set they come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from robustft.data import ImageDataset, PathDataset, sources, stress
from robustft.data.corruptions import PARAMETERS, SEVERITIES, corrupt


def picture(seed=0, size=(64, 48)):
    """Soft colours with an edge, so that every corruption finds something to change."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    shade = np.stack([x, y, (x + y + seed / 7) % 1.0], 2)
    shade[10:30, 20:44] = (0.9, 0.3, 0.1)
    return Image.fromarray((255 * shade).astype(np.uint8))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 128 - 1


def distance(a, b):
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


@pytest.fixture
def files(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    samples = tuple((tmp_path / f"{i}.png", i % 2) for i in range(3))
    return PathDataset(samples, ("cat", "dog"), np.asarray, groups=torch.tensor([0, 1, 0]), group_names=("in", "out"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_corruption_is_a_function_of_the_seed_and_grows_with_severity(name):
    image = picture(size=(224, 160))
    made = [corrupt(image, name, severity, seed=3) for severity in SEVERITIES]
    assert all(other.mode == "RGB" and other.size == image.size for other in made)
    far = [distance(image, other) for other in made]
    assert far == sorted(far) and far[0] > 0.2 and far[-1] > 1.5 * far[0], far
    assert distance(made[2], corrupt(image, name, 3, seed=3)) == 0.0
    if name in ("noise", "elastic", "perspective"):
        assert distance(made[2], corrupt(image, name, 3, seed=4)) > 0.2


def test_directions_go_both_ways():
    turned = {corrupt(picture(), "rotate", 3, seed=seed).tobytes() for seed in range(12)}
    assert len(turned) == 2


def test_a_data_set_of_files_keeps_all_but_its_pixels(files):
    made = stress(files, seed=1)
    assert list(made)[:4] == ["noise 1", "noise 3", "noise 5", "blur 1"] and len(made) == 3 * len(PARAMETERS)
    noisy = made["noise 3"]
    assert (noisy.classes, noisy.samples, noisy.group_names) == (files.classes, files.samples, files.group_names)
    assert noisy.labels.equal(files.labels) and sources.groups_of(noisy).equal(files.groups) and len(noisy) == 3
    item, plain = noisy[1], files[1]
    assert item.keys() == plain.keys() and (item["label"], item["group"]) == (1, 1)
    assert isinstance(item["image"], np.ndarray) and distance(item["image"], plain["image"]) > 1
    assert distance(noisy[-2]["image"], item["image"]) == 0.0
    with pytest.raises(IndexError):
        noisy[3]
    assert isinstance(noisy.with_transform(None)[0]["image"], Image.Image)


def test_workers_read_it_where_they_read_the_data_set_and_give_the_same(files):
    by_two = stress(replace(files, workers=2, transform=to_tensor, groups=None))["noise 3"]
    assert (
        sources.reading_workers(by_two, 3) == 2 and sources.reading_workers(stress([(picture(), 0)])["noise 1"], 3) == 0
    )
    (images, labels), (same, _) = (next(sources.batches(by_two, workers=workers)) for workers in (0, None))
    assert images.equal(same) and labels.tolist() == [0, 1, 0]


def test_items_differ_by_index_and_are_the_same_in_any_order(files):
    same = PathDataset(tuple((files.samples[0][0], 0) for _ in range(2)), files.classes)
    noisy = stress(same)["noise 3"]
    second, first = noisy[1][0], noisy[0][0]
    assert distance(first, second) > 1 and distance(noisy[0][0], first) == 0.0


def test_fingerprints_tell_corruptions_seeds_and_data_apart(files):
    made = [*stress(files).values(), *stress(files, seed=1).values(), stress(files.subset([0, 1]))["noise 1"]]
    prints = [data.fingerprint for data in made]
    assert len(set(prints)) == len(prints) and files.fingerprint not in prints
    assert stress(files)["blur 3"].fingerprint == made[4].fingerprint
    assert sources.fingerprint(made[0]) != sources.fingerprint(made[1])


def test_images_in_memory_are_corrupted_as_tensors_too():
    images = np.stack([np.asarray(picture(i)) for i in range(3)])
    data = ImageDataset(images, torch.tensor([0, 1, 0]), ("a", "b"))
    dark = stress(data, (5,))["dark 5"]
    tensors, labels = dark.tensors((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert labels.equal(data.labels)
    read = np.stack([np.asarray(dark[i][0]) for i in range(3)])
    torch.testing.assert_close((tensors * 255).round().byte(), torch.from_numpy(read.transpose(0, 3, 1, 2).copy()))
    assert read.mean() < 0.3 * images.mean()


def test_large_images_are_brought_to_the_size_that_models_see_and_tiny_ones_survive():
    assert corrupt(picture(size=(600, 450)), "noise", 1, seed=0).size == (299, 224)
    assert corrupt(picture(size=(600, 450)), "noise", 1, seed=0, size=336).size == (448, 336)
    dot = Image.new("RGB", (1, 1), (200, 100, 50))
    for name in PARAMETERS:
        assert corrupt(dot, name, 5, seed=0).size == (1, 1)


def test_other_data_sets_of_pictures_are_taken_and_tensors_are_not():
    pairs = [(picture(), 1), (picture(1), 0)]
    assert stress(pairs, (5,), names=["grey"])["grey 5"][0][1] == 1
    with pytest.raises(TypeError, match="image 0 of the data set is a Tensor, not a PIL image"):
        stress([(torch.zeros(3, 8, 8), 0)])["noise 1"][0]
    with pytest.raises(TypeError, match="must be map-style, of PIL images, got tuple"):
        stress((torch.zeros(2, 3, 8, 8), torch.zeros(2)))
    with pytest.raises(ValueError, match=r"names holds \['fog'\]"):
        stress(pairs, names=["fog"])
    with pytest.raises(ValueError, match=r"severities holds \[6\]"):
        stress(pairs, (1, 6))
