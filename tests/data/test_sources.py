"""What a data set may be: every kind gives the same samples, in evaluation and in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import robustft
from robustft import clip
from robustft.data import sources
from robustft.data.sources import Source, batches, image_batches, on_host, to_device
from robustft.evaluation import evaluate
from robustft.predictors import zero_shot_classifier

N = 11


class Items:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


class Fast(Items):
    def tensors(self, mean, std):
        return self.images, self.labels


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.image_mean = self.visual.image_std = (0.5, 0.5, 0.5)


@pytest.fixture
def pair():
    return torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(N) % 4


def kinds(pair):
    images, labels = pair
    named = {"image": images, "label": labels}
    return {
        "pair": pair,
        "list": list(pair),
        "dictionary": named,
        "TensorDataset": TensorDataset(*pair),
        "items": Items(*pair),
        "dictionaries": [{"image": image, "label": int(label)} for image, label in zip(*pair, strict=True)],
        "fast": Fast(*pair),
    }


def parts(batch):
    return (batch["image"], batch["label"]) if isinstance(batch, dict) else batch


@pytest.mark.parametrize("kind", kinds((torch.zeros(1), torch.zeros(1))))
def test_every_kind_gives_the_same_samples_in_order_and_by_index(pair, kind):
    data = kinds(pair)[kind]
    source = Source(data, Model())
    assert len(source) == N
    found = list(source.in_order(4))
    assert [len(images) for images, _ in found] == [4, 4, 3]
    assert all(torch.equal(torch.cat(whole), part) for whole, part in zip(zip(*found, strict=True), pair, strict=True))
    chunks = [torch.tensor([7, 0, 3]), torch.tensor([1])]
    for workers in (0, 1):
        for chunk, batch in zip(chunks, source.batches(enumerate(chunks), seed=0, workers=workers), strict=True):
            assert isinstance(batch, dict) == ("dictionar" in kind)
            assert all(torch.equal(got, part[chunk]) for got, part in zip(parts(batch), pair, strict=True))


@pytest.mark.parametrize("kind", ["items", "fast", "TensorDataset"])
def test_groups_of_any_object_go_along(pair, kind):
    data = kinds(pair)[kind]
    data.groups = torch.arange(N) // 2
    chunk = torch.tensor([9, 2])
    (batch,) = Source(data, Model()).batches([(0, chunk)], seed=0)
    assert batch.keys() == {"image", "label", "group"} and torch.equal(batch["group"], data.groups[chunk])
    assert all(torch.equal(got, part[chunk]) for got, part in zip(parts(batch), pair, strict=True))
    images, labels = next(batches(data, Model(), batch_size=N))
    assert torch.equal(images, pair[0]) and torch.equal(labels, pair[1])


def test_captions_stay_texts_beside_groups(pair):
    data = [(image, f"a {i}") for i, image in enumerate(pair[0])]
    named = type("Captioned", (list,), {"groups": torch.arange(N)})(data)
    (batch,) = Source(named).batches([(0, torch.tensor([4, 5]))], seed=0)
    assert batch["text"] == ["a 4", "a 5"] and batch["group"].tolist() == [4, 5]


def test_images_alone_have_no_labels(pair):
    found = list(image_batches(pair[0], batch_size=4))
    assert torch.equal(torch.cat([images for images, _ in found]), pair[0])
    assert [labels for _, labels in found] == [None] * 3
    assert torch.equal(next(image_batches(pair, batch_size=N))[1], pair[1])


def test_what_a_resumed_run_must_find_the_same_is_told_of_tensors(pair):
    images, labels = pair
    plain = Source(pair).check_training(4)
    assert plain.keys() == {"samples", "image_shape", "labels"} and plain["samples"] == N
    assert plain == Source((images + 1, labels.int())).check_training(4)
    assert plain["labels"] != Source((images, labels.flip(0))).check_training(4)["labels"]
    named = {"image": images, "label": labels, "group": labels}
    assert Source(named).check_training(4)["columns"].keys() == {"group"}
    assert Source(Items(*pair)).check_training(4) == {"samples": N}


def test_what_is_no_data_set_is_refused_by_name(pair):
    with pytest.raises(TypeError, match="data must be .* got int"):
        Source(3, name="data")
    with pytest.raises(TypeError, match=r'data of tensors must hold "image", a tensor, got the keys \[.label.\]'):
        Source({"label": pair[1]}, name="data")
    with pytest.raises(TypeError, match='"image"'):
        Source({"image": np.zeros((2, 3, 4, 4)), "label": pair[1]})
    for empty in ([], (pair[0][:0], pair[1][:0]), {"image": pair[0][:0], "label": pair[1][:0]}):
        with pytest.raises(ValueError, match="data is empty"):
            Source(empty, name="data")


class Counted:
    """Image files in spirit: items are made one by one, here or in workers, and each is counted in a file."""

    classes = ("a", "b")
    workers = None

    def __init__(self, folder, count=70):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        (self.folder / f"{index}.{len(list(self.folder.glob(f'{index}.*')))}").touch()
        if index == self.count:
            raise IndexError
        return torch.full((3, 2, 2), index / 128), index % 2


@pytest.mark.parametrize("batch_size", [16, 50, 100])
def test_workers_read_the_same_batches_once_and_in_order(tmp_path, batch_size):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    data = Counted(tmp_path)
    for workers in (0, 2):
        found = list(sources.batches(data, batch_size=batch_size, workers=workers))
        assert [len(labels) for _, labels in found] == [min(batch_size, 70 - i) for i in range(0, 70, batch_size)]
        images = torch.cat([images for images, _ in found])
        assert torch.equal(images[:, 0, 0, 0], torch.arange(70) / 128)
        assert torch.equal(torch.cat([labels for _, labels in found]), torch.arange(70) % 2)
    assert len(list(tmp_path.iterdir())) == 140
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing was drawn from the caller's generator


def test_an_error_in_a_worker_is_the_error_itself(tmp_path):
    class Broken(Counted):
        def __getitem__(self, index):
            if index == 40:
                raise ValueError("photo.jpg: damaged, or no image")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match=r"^photo.jpg: damaged, or no image$"):
        list(sources.batches(Broken(tmp_path), batch_size=8, workers=2))


def test_only_sets_that_say_so_are_read_by_workers_unasked(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    declared, foreign = type("Declared", (), {"workers": None})(), object()
    assert sources.reading_workers(declared, sources.FILES_FOR_WORKERS) == 4
    assert sources.reading_workers(declared, sources.FILES_FOR_WORKERS - 1) == 0
    assert sources.reading_workers(foreign, 10**6) == 0
    assert sources.reading_workers(foreign, 10, 3) == 3
    declared.workers = 2
    assert sources.reading_workers(torch.utils.data.Subset(declared, [0]), 1) == 2
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        sources.reading_workers(foreign, 10, -1)


class Streamed(torch.utils.data.IterableDataset):
    """Items as they come, which counts how many have been asked for."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels, self.given = images, labels, 0
        if classes is not None:
            self.classes = classes

    def __iter__(self):
        for image, label in zip(self.images, self.labels, strict=True):
            self.given += 1
            yield image, int(label)


def test_an_iterable_set_is_read_a_batch_at_a_time(validation):
    data = Streamed(*validation)
    first = next(found := sources.batches(data, batch_size=8))
    assert data.given == 8 and torch.equal(first[0], validation[0][:8])
    rest = list(found)
    assert torch.equal(torch.cat([first[1], *(labels for _, labels in rest)]), validation[1])
    with pytest.raises(ValueError, match="dataset is empty"):
        list(sources.batches(Streamed([], [])))


def test_an_iterable_set_gives_what_its_items_would(clip_model, prompts, validation):
    classifier = zero_shot_classifier(clip_model, **prompts)
    names = tuple(reversed(prompts["class_names"]))
    whole = classifier.predict((validation[0], 2 - validation[1]))
    streamed = classifier.predict(Streamed(*validation, classes=names))
    assert torch.equal(whole.labels, streamed.labels)
    torch.testing.assert_close(whole.logits, streamed.logits)
    encoded = clip.encode(clip_model, Streamed(*validation), batch_size=7, progress=True)
    torch.testing.assert_close(encoded.image_features, whole.features.float())
    evaluation = evaluate({"zero-shot": classifier}, id=Streamed(*validation, classes=names), details=True)
    assert evaluation.models["zero-shot"].id.calibration.count == len(validation[1])


def test_an_iterable_set_is_not_trained_on_nor_cached(clip_model, prompts, validation, tmp_path):
    with pytest.raises(TypeError, match="to be shuffled, got an iterable Streamed"):
        robustft.fit(robustft.FineTune(clip_model, **prompts), Streamed(*validation), epochs=1, batch_size=8, lr=1e-3)
    with pytest.raises(ValueError, match="encode it without cache"):
        clip.encode(clip_model, Streamed(*validation), cache=tmp_path)


def test_labels_that_were_moved_are_found_where_they_came_from_until_they_are_written():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([2, 0, 1])
    moved = to_device((images, labels), torch.device("meta"))
    assert on_host(moved[1]) is labels and on_host(moved[0]) is moved[0]
    assert on_host(to_device({"image": images, "label": labels}, torch.device("meta"))["label"]) is labels
    stayed = to_device((images, labels), torch.device("cpu"))[1]
    assert stayed is labels and on_host(labels) is labels
    moved[1].add_(1)
    assert on_host(moved[1]) is moved[1]
