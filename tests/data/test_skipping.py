"""on_error="skip": what reads images goes on without those that cannot be read, and tells which they were."""

from __future__ import annotations

import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_clip import NAMES

from robustft import clip, data, methods
from robustft.data.shards import read_shards
from robustft.data.sources import Source
from robustft.data.wrappers import groups_of
from robustft.evaluation import evaluate
from robustft.predictors import zero_shot_classifier
from robustft.training import fit
from robustft.training.validation import Validation

BAD, MISSING = (1, 5), 8
LOST = (*BAD, MISSING)


def to_tensor(image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return pixels * 2 - 1


@pytest.fixture
def files(tmp_path):
    """Twelve images of three classes; two are damaged, one is missing."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i:02}.png" for i in range(12)]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).save(path)
    for i in BAD:
        paths[i].write_bytes(paths[i].read_bytes()[:60])
    paths[MISSING].unlink()
    lines = [f"{path.name},{NAMES[i % 3]}" for i, path in enumerate(paths)]
    (tmp_path / "table.csv").write_text("path,label\n" + "\n".join(lines))
    return data.open(tmp_path / "table.csv", on_error="skip").map(lambda part: part.with_transform(to_tensor))


@pytest.fixture
def images(files):
    """All twelve, in the order of the table: no part is held out."""
    rows = [*files.train.samples, *files.validation.samples]
    return replace(files.train, samples=tuple(sorted(rows)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_others_keep_order_labels_and_pixels(images, workers):
    source = Source(images)
    with pytest.warns(UserWarning, match=r"3 of 12 images could not be read .*01\.png.*05\.png.*08\.png"):
        pixels, labels = (torch.cat(part) for part in zip(*source.in_order(5, workers), strict=True))
    kept = [i for i in range(12) if i not in LOST]
    assert labels.tolist() == [i % 3 for i in kept]
    assert torch.equal(pixels, torch.stack([images[i][0] for i in kept]))
    assert [one.row for one in source.skipped.values()] == list(LOST)
    assert all(f"{i:02}.png" in source.skipped[i].error for i in LOST)


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_is_the_default_and_names_the_file(images, workers):
    for index, error in ((1, ValueError), (8, FileNotFoundError)):
        one = replace(images, on_error="raise").subset([0, index])
        assert one.on_error == "raise"
        with pytest.raises(error, match=f"{index:02}.png"):
            list(Source(one).in_order(2, workers))
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        replace(images, on_error="ignore")


def test_a_set_of_which_nothing_can_be_read_is_an_error(images):
    for read in (lambda s: list(s.in_order(2)), lambda s: next(s.batches([(0, torch.tensor([0]))], seed=0))):
        with pytest.raises(ValueError, match=r"none of .* 2 images can be read: .*01\.png"):
            read(Source(images.subset(BAD)))


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_features_and_predictions_have_a_row_less_and_say_which(images, clip_model, prompts, tmp_path):
    kept = images.subset([i for i in range(12) if i not in LOST])
    features = clip.encode(clip_model, torch.utils.data.Subset(images, range(12)), cache=tmp_path / "cache",
                           transform_key="own")  # fmt: skip
    whole = clip.encode(clip_model, kept)
    assert torch.equal(features.image_features, whole.image_features) and torch.equal(features.labels, whole.labels)
    assert [one.row for one in features.skipped] == list(LOST) and whole.skipped == ()
    assert not (tmp_path / "cache").exists()
    predictor = zero_shot_classifier(clip_model, **prompts)
    outputs = predictor.predict(images, batch_size=4)
    assert torch.equal(outputs.labels, whole.labels)
    assert outputs.only("logits").skipped == features.skipped
    torch.testing.assert_close(outputs.logits, predictor.predict(kept).logits)


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_the_next_image_takes_a_place_in_training_in_any_process(images):
    chunks = [(0, torch.tensor([0, 1, 4])), (0, torch.tensor([8, 7, 5]))]
    for workers in (0, 2):
        source = Source(images)
        found = list(source.batches(chunks, seed=0, workers=workers))
        for (pixels, labels), rows in zip(found, ([0, 2, 4], [9, 7, 6]), strict=True):
            assert torch.equal(pixels, torch.stack([images[i][0] for i in rows]))
            assert labels.tolist() == [i % 3 for i in rows]
        assert sorted(source.skipped) == list(LOST)


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_a_resumed_training_over_damaged_images_ends_in_the_same_bits(images, clip_model, prompts, tmp_path):
    def trained(**options):
        method = methods.FineTune(clip_model, **prompts)
        history = fit(method, images, batch_size=4, lr=1e-3, progress=False, **options)
        return method.state_dict(), history

    whole, history = trained(epochs=2)
    assert {one.row for one in history.skipped} == set(LOST)
    trained_at_first = methods.FineTune(clip_model, **prompts)

    class Stop(Exception):
        pass

    steps = iter(range(4))

    def step(batch, original=trained_at_first.step):
        if next(steps) == 3:  # of the second epoch
            raise Stop
        return original(batch)

    trained_at_first.step = step
    with pytest.raises(Stop):
        fit(trained_at_first, images, epochs=2, batch_size=4, lr=1e-3, progress=False, output=tmp_path / "run")
    again, _ = trained(epochs=2, output=tmp_path / "run", resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items() if isinstance(value, torch.Tensor))


def test_members_of_archives_are_skipped_alike(tmp_path, images):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            (tmp_path / f"{i}.cls").write_text(str(i))
            archive.add(images.samples[i][0], f"{i}.png")
            archive.add(tmp_path / f"{i}.cls", f"{i}.cls")
    shards = replace(read_shards(str(tmp_path / "a.tar")), on_error="skip").with_transform(to_tensor)
    with pytest.warns(UserWarning, match=r"1 of 3 images .*a\.tar/1\.png"):
        ((_, labels),) = Source(shards).in_order(3)
    assert labels.tolist() == [0, 2]


def test_an_opened_tree_with_a_damaged_image_is_split(tmp_path, images):
    for i, (path, label) in enumerate(images.samples[:6]):
        (tmp_path / "tree" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "tree" / NAMES[label] / f"{i}.png")
    with pytest.raises(ValueError, match=r"1\.png: damaged"):
        data.open(tmp_path / "tree")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data.open(tmp_path / "tree", on_error="skip")
    assert sum(len(part) for part in found.sets().values()) == 6
    assert all(part.on_error == "skip" for part in found.sets().values())


def wrapped(images):
    """By name, wrappers of the twelve images in their order."""
    from torch.utils.data import ConcatDataset, Subset, random_split

    first, second, whole = images.subset(range(5)), images.subset(range(5, 12)), range(12)
    parts = random_split(images, [5, 7], torch.Generator().manual_seed(0))
    order = [*parts[0].indices, *parts[1].indices]
    back = [order.index(row) for row in whole]
    return {
        "concatenated": ConcatDataset([first, second]),
        "subset of concatenated": Subset(ConcatDataset([first, second]), whole),
        "concatenated subsets": ConcatDataset([Subset(first, range(5)), Subset(Subset(images, whole), whole[5:])]),
        "split at random": Subset(ConcatDataset(parts), back),
    }


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_wrappers_skip_what_the_sets_in_them_skip(images, clip_model, prompts):
    expected = torch.stack([images[i][0] for i in range(12) if i not in LOST])
    for name, data_set in wrapped(images).items():
        source = Source(data_set)
        assert torch.equal(torch.cat([pixels for pixels, _ in source.in_order(5)]), expected), name
        assert sorted(source.skipped) == list(LOST), name
        ((pixels, _),) = Source(data_set).batches([(0, torch.tensor([0, 1, 8]))], seed=0)
        assert torch.equal(pixels, torch.stack([images[i][0] for i in (0, 2, 9)])), name
        assert [one.row for one in zero_shot_classifier(clip_model, **prompts).predict(data_set).skipped] == [*LOST]


def test_a_part_that_wants_errors_raises_beside_one_that_skips(images):
    strict = replace(images.subset([0, 1, 2]), on_error="raise")
    both = torch.utils.data.ConcatDataset([images, strict])
    with pytest.raises(ValueError, match=r"01\.png"):
        list(Source(both).in_order(15))
    with pytest.raises(ValueError, match=r"01\.png"):
        next(Source(both).batches([(0, torch.tensor([13]))], seed=0))
    assert not Source(torch.utils.data.ConcatDataset([strict, strict])).skips


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_groups_are_those_of_the_images_that_could_be_read(images, clip_model, prompts):
    grouped = replace(images, groups=torch.arange(12) // 6, group_names=("first", "second"))
    kept = grouped.subset([i for i in range(12) if i not in LOST])
    predictor = zero_shot_classifier(clip_model, **prompts)
    found, expected = (evaluate({"m": predictor}, id=d, details=True).models["m"].id.groups for d in (grouped, kept))
    assert found == expected and [group.name for group in found] == ["first", "second"]
    both = torch.utils.data.ConcatDataset([grouped.subset(range(4)), grouped.subset(range(4, 12))])
    assert evaluate({"m": predictor}, id=both, details=True).models["m"].id.groups == expected
    method = methods.FineTune(clip_model, **prompts)
    measured = Validation(method, both, metric="worst_group").measure(0)
    assert measured == Validation(method, kept, metric="worst_group").measure(0)
    other = replace(grouped, group_names=("second", "first"))
    assert groups_of(torch.utils.data.ConcatDataset([grouped, other])) is None
    with pytest.raises(ValueError, match="groups are of 11 images, but the outputs of 12"):
        predictor.predict(grouped).of_rows(torch.zeros(11), "groups")


def test_a_stressed_set_skips_as_the_set_does(images):
    assert all(part.on_error == "skip" for part in data.stress(images, names=["grey"]).values())
    stressed = data.stress(images, (1,), names=["grey"])["grey 1"]
    with pytest.warns(UserWarning, match="3 of 12"):
        ((_, labels),) = Source(stressed).in_order(12)
    assert len(labels) == 9
