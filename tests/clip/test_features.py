from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from robustft.clip.features import Features, encode
from robustft.data.paths import PathDataset
from robustft.data.sources import batches, fingerprint, image_statistics


class Tower(nn.Module):
    """The face of an open_clip model, a linear map of the mean colour; counts its calls."""

    def __init__(self, seed: int = 0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.proj = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)))
        self.visual.preprocess_cfg = {"mean": mean, "std": std}
        self.dropout = nn.Dropout(0.5)
        self._calls = 0  # private, because public attributes are the model's settings

    @property
    def calls(self) -> int:
        return self._calls

    def encode_image(self, images):
        self._calls += 1
        return self.dropout(images.mean((2, 3)) @ self.visual.proj)


class Items:
    """A map-style data set without tensors."""

    def __init__(self, images, labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


class Fast(Items):
    fingerprint = "fast-1"

    def tensors(self, mean, std):
        shift, scale = (torch.tensor(s).view(3, 1, 1) for s in (mean, std))
        return (self.images - shift) / scale, self.labels


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return torch.rand(11, 3, 4, 4, generator=g), torch.arange(11) % 4


def test_features_are_the_unit_outputs_in_order_for_every_kind_of_data_set(data):
    images, labels = data
    model = Tower().train()
    expected = nn.functional.normalize(images.mean((2, 3)) @ model.visual.proj.detach(), dim=-1)
    named = {"image": images, "label": labels, "group": labels}
    items = [{"image": image, "label": int(label), "group": 0} for image, label in zip(*data, strict=True)]
    for dataset in (data, list(data), named, items, torch.utils.data.TensorDataset(*data), Items(*data)):
        f = encode(model, dataset, batch_size=4)
        torch.testing.assert_close(f.image_features, expected)
        assert torch.equal(f.labels, labels) and len(f) == 11 and not f.image_features.requires_grad
    assert model.training and model.dropout.training


def test_the_fast_path_uses_the_models_own_statistics(data):
    model = Tower(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    mean, std = image_statistics(model)
    assert (mean, std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)) == image_statistics(nn.ModuleList([model]))
    normalised = (data[0] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    a, b = encode(model, Fast(*data)), encode(model, (normalised, data[1]))
    torch.testing.assert_close(a.image_features, b.image_features)
    assert image_statistics(SimpleNamespace(model=model))[0] == mean
    for silent in (nn.Linear(1, 1), None):
        with pytest.raises(ValueError, match="carries no image statistics"):
            image_statistics(silent)


@pytest.mark.filterwarnings("ignore:images hold 255ths")
def test_transform_makes_the_tensors(data):
    as_arrays = Items([(255 * x).permute(1, 2, 0).byte().numpy() for x in data[0]], data[1])
    with pytest.raises(TypeError, match="got ndarray: pass the model's transform"):
        encode(Tower(), as_arrays)
    f = encode(Tower(), as_arrays, transform=lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255.0)
    torch.testing.assert_close(f.image_features, encode(Tower(), data).image_features, atol=0.05, rtol=0)


def test_a_cached_set_is_encoded_once(data, tmp_path):
    model = Tower().eval()
    first = encode(model, data, cache=tmp_path)
    again = encode(model, data, cache=tmp_path, batch_size=3)
    assert model.calls == 1 and torch.equal(first.image_features, again.image_features)
    assert torch.equal(first.labels, again.labels)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_whatever_features_depend_on_is_in_the_key(data, tmp_path):
    def run(model=None, dataset=data, **kwargs):
        model = model or Tower()
        encode(model, dataset, cache=tmp_path, **kwargs)
        return model.calls

    def half(x):
        return x / 2

    def normalize(mean):
        return transforms.Compose([transforms.Normalize([mean] * 3, [1.0] * 3)])

    fast, other = Fast(*data), Fast(*data)
    other.fingerprint = "fast-2"
    assert run() == 1 and run() == 0
    assert run(Tower(seed=1)) == 1
    assert run(dataset=(data[0] + 1e-6, data[1])) == 1
    assert run(dataset=(data[0], data[1] + 1)) == 1
    assert run(dtype=torch.bfloat16) == 1
    assert run(dataset=fast) == 1 and run(dataset=fast) == 0 and run(dataset=other) == 1
    for transform, key in ((half, "half"), (half, "half-2"), (normalize(0.1), None), (normalize(0.2), None)):
        assert run(dataset=fast, transform=transform, transform_key=key) == 1
        assert run(dataset=fast, transform=transform, transform_key=key) == 0
    assert run(Tower(mean=(0.0, 0.0, 0.0)), dataset=fast) == 1
    for name in ("transform", "target_transform", "transforms"):
        setattr(fast, name, normalize(0.1))
        assert run(dataset=fast) == 1
    assert len(list(tmp_path.iterdir())) == 15


def test_transforms_that_cannot_be_told_apart_are_cached_under_a_key_only(data, tmp_path):
    def shifted(by):  # torchvision prints both as Compose(Lambda())
        return transforms.Compose([transforms.Lambda(lambda x: x + by)])

    images = Items(*data)
    unclear = (shifted(0.0), shifted(1.0), lambda x: x, transforms.RandomErasing())
    unclear += (transforms.Normalize(torch.zeros(3), torch.ones(3)),)  # prints four digits of its tensors
    for transform in unclear:
        with pytest.raises(ValueError, match=r"transform \(\w+\) cannot be told .* pass transform_key"):
            encode(Tower(), images, transform=transform, cache=tmp_path)
    for name in ("transform", "target_transform", "transforms"):
        labelled = Fast(*data)
        setattr(labelled, name, lambda x: x)
        with pytest.raises(ValueError, match=rf"dataset.{name} \(function\) cannot be told"):
            encode(Tower(), labelled, cache=tmp_path)
    images.fingerprint = "items"
    a, b = (encode(Tower(), images, transform=shifted(i), transform_key=f"{i}", cache=tmp_path) for i in (0, 1))
    assert not torch.equal(a.image_features, b.image_features)


def test_open_clips_evaluation_transforms_need_no_key(tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    pictures = Items([Image.new("RGB", (40, 30), colour) for colour in ("red", "green")], torch.arange(2))
    pictures.fingerprint = "pictures"
    for size, mode in ((8, "shortest"), (8, "longest"), (8, "squash"), ((8, 6), "shortest")):
        transform = image_transform_v2(PreprocessCfg(size=size, resize_mode=mode), is_train=False)
        encode(Tower(), pictures, transform=transform, cache=tmp_path)
        model = Tower()
        encode(model, pictures, transform=copy.deepcopy(transform), cache=tmp_path)
        assert model.calls == 0
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:7]])
def test_a_truncated_cache_file_is_rebuilt_with_one_warning(data, tmp_path, damage):
    first = encode(Tower(), data, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="is damaged") as record:
        second = encode(Tower(), data, cache=tmp_path)
    assert len(record) == 1 and torch.equal(first.image_features, second.image_features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Tower()
        encode(model, data, cache=tmp_path)
    assert model.calls == 0


def seen_by(model):
    """The number of images that a tower is shown, as a list of batches."""
    batches, encode_image = [], model.encode_image
    model.encode_image = lambda images: batches.append(len(images)) or encode_image(images)
    return batches


def test_a_killed_extraction_goes_on_where_it_was(data, tmp_path, monkeypatch):
    monkeypatch.setattr("robustft.clip.features.SECONDS_BETWEEN_PARTS", 0.0)
    whole = encode(Tower(), data, batch_size=2)
    for kill_at in (3, 1):  # a second kill, too, and a machine of another batch size in the end
        model = Tower()
        seen, encode_image = seen_by(model), model.encode_image

        def killed(images, seen=seen, kill_at=kill_at, encode_image=encode_image):
            if len(seen) == kill_at:
                raise KeyboardInterrupt
            return encode_image(images)

        model.encode_image = killed
        with pytest.raises(KeyboardInterrupt):
            encode(model, data, batch_size=2, cache=tmp_path)
    model = Tower()
    seen = seen_by(model)
    found = encode(model, data, batch_size=5, cache=tmp_path)
    assert seen == [3] and torch.equal(found.image_features, whole.image_features)
    assert torch.equal(found.labels, whole.labels) and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_part_is_encoded_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr("robustft.clip.features.SECONDS_BETWEEN_PARTS", 0.0)
    monkeypatch.setattr("robustft.clip.kept.Kept.finish", lambda *_: None)
    whole = encode(Tower(), data, batch_size=4, cache=tmp_path)
    (second,) = tmp_path.glob("*-4.safetensors")
    content = bytearray(second.read_bytes())
    content[-3] ^= 1
    second.write_bytes(content)
    model = Tower()
    seen = seen_by(model)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        found = encode(model, data, batch_size=4, cache=tmp_path)
    assert seen == [4, 3] and torch.equal(found.image_features, whole.image_features)


@pytest.fixture
def files(tmp_path):
    """Twelve images in files, as a data set."""
    samples = []
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        samples.append((tmp_path / f"{number}.png", number % 3))
    return PathDataset(tuple(samples), ("a", "b", "c"), transforms.Compose([transforms.ToTensor()]))


@pytest.mark.filterwarnings("ignore:images hold 255ths")
def test_a_subset_of_a_cached_set_is_not_encoded_again(files, tmp_path):
    whole = encode(Tower(), files, cache=tmp_path / "cache")
    rows = [7, 2, 2, 11]
    for part in (files.subset(rows), torch.utils.data.Subset(files, rows)):
        model = Tower()
        found = encode(model, part, cache=tmp_path / "cache")
        assert model.calls == 0 and torch.equal(found.image_features, whole.image_features[rows])
        assert found.labels.tolist() == [1, 2, 2, 2]
    for other in ({"model": Tower(seed=1)}, {"dtype": torch.bfloat16}):
        model = other.pop("model", Tower())
        encode(model, files.subset(rows), cache=tmp_path / "cache", **other)
        assert model.calls == 1


@pytest.mark.filterwarnings("ignore:images hold 255ths")
def test_of_a_set_that_has_grown_or_changed_only_what_is_new_is_encoded(files, tmp_path):
    encode(Tower(), files.subset([0, 4, 8]), cache=tmp_path / "cache")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "4.png")
    model = Tower()
    seen = seen_by(model)
    found = encode(model, files, cache=tmp_path / "cache")
    expected = encode(Tower(), files)
    assert seen == [10] and torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.image_features, expected.image_features)
    (tmp_path / "5.png").write_bytes(b"")
    model = Tower()
    seen = seen_by(model)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "6.png")
    with pytest.warns(UserWarning, match="1 of 2 images could not be read"):
        found = encode(model, replace(files, on_error="skip"), cache=tmp_path / "cache")
    assert seen == [1] and [one.row for one in found.skipped] == [5] and len(found) == 11
    torch.testing.assert_close(
        found.image_features, encode(Tower(), files.subset([*range(5), *range(6, 12)])).image_features
    )


def test_a_failed_write_leaves_nothing_behind(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        encode(Tower(), data, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_undefined_features_are_refused_and_not_cached(data, tmp_path):
    images = data[0].clone()
    images[[2, 7], 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="2 of 11 image features hold NaN"):
        encode(Tower(), (images, data[1]), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_and_arrays_have_fingerprints(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    folder = SimpleNamespace(samples=[(str(tmp_path / "a.png"), 0)], transform=None)
    before = fingerprint(folder)
    (tmp_path / "a.png").write_bytes(b"12")
    assert fingerprint(folder) != before
    arrays = SimpleNamespace(data=np.zeros((2, 4, 4, 3), np.uint8), targets=[0, 1])
    assert fingerprint(arrays) != fingerprint(SimpleNamespace(data=arrays.data, targets=[0, 2]))
    with pytest.raises(ValueError, match="cannot be told from other data sets: give it a `fingerprint`"):
        fingerprint(SimpleNamespace())


def test_what_is_no_data_set_is_refused(data):
    with pytest.raises(TypeError, match="dataset must be .* got generator"):
        batches(x for x in ())
    with pytest.raises(ValueError, match="dataset is empty"):
        encode(Tower(), (data[0][:0], data[1][:0]))
    with pytest.raises(ValueError, match=r"got \(11, 3, 4, 4\) torch.float32 and \(10,\)"):
        encode(Tower(), (data[0], data[1][:10]))
    with pytest.raises(ValueError, match="torch.uint8"):
        encode(Tower(), (data[0].byte(), data[1]))
    with pytest.raises(ValueError, match="transform must be None"):
        encode(Tower(), data, transform=abs)
    with pytest.raises(ValueError, match="batch_size"):
        encode(Tower(), data, batch_size=0)
    with pytest.raises(ValueError, match="dtype"):
        encode(Tower(), data, dtype=torch.float64)


def test_features_carry_optional_logits(data):
    f = Features(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4))
    assert f.logits.shape == (2, 4) and encode(Tower(), data).logits is None


NORMALIZED = (torch.linspace(0, 1, 192).view(1, 3, 8, 8) * 255).round() / 255


@pytest.mark.parametrize(
    "images, what",
    [(NORMALIZED, "255ths from 0 to 1"), (NORMALIZED.double() * 255, "whole numbers from 0 to 255")],
)
def test_images_that_are_still_pixels_get_one_warning(data, images, what):
    dataset = images.repeat(5, 1, 1, 1), torch.zeros(5, dtype=torch.int64)
    with pytest.warns(UserWarning, match=f"images hold {what}.*normalised by mean .*pass its transform") as caught:
        list(batches(dataset, Tower(), batch_size=2))
    assert len(caught) == 1
    items = [(image, 0) for image in dataset[0]]
    with pytest.warns(UserWarning, match=what):
        list(batches(items, batch_size=2))


def test_images_that_may_be_normalised_get_no_warning(recwarn):
    identity = Tower(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    plain = (NORMALIZED - 0.45) / 0.27, torch.rand(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    for images in (*plain, NORMALIZED / 20, NORMALIZED.half(), torch.zeros(2, 3, 0, 0)):
        list(batches((images, torch.zeros(len(images))), Tower()))
    list(batches((NORMALIZED, torch.zeros(1)), identity))
    assert not recwarn.list
