"""GlyphWorld: deterministic, honestly split, and shifted the way its names say."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from robustft import clip
from robustft.data import ImageDataset, base_model, glyphs
from robustft.data import glyphworld as world

MEAN, STD = base_model.CONFIG["preprocess_cfg"]["mean"], base_model.CONFIG["preprocess_cfg"]["std"]
SPLITS = {"train": 1000, "validation": 297, "test": 500}


@pytest.fixture(scope="module")
def bundle():
    return world.load_clip()


@pytest.fixture(scope="module")
def head(bundle):
    with torch.no_grad():
        return clip.class_embeddings(bundle.model, bundle.tokenizer, world.CLASS_NAMES, world.TEMPLATES)


@torch.no_grad()
def accuracy(bundle, head, dataset):
    images, labels = dataset.tensors(MEAN, STD)
    return (clip.encode_images(bundle.model, images) @ head.T).argmax(1).eq(labels).float().mean().item()


# The benchmark


@pytest.mark.exhaustive
def test_equal_calls_give_equal_bytes_and_another_seed_gives_others():
    for make in (
        lambda seed: world.digits("test", seed=seed),
        lambda seed: world.ood("letters", seed=seed),
        lambda seed: world.ood("textures", seed=seed),
        lambda seed: world.spurious("train", seed=seed),
        *(lambda seed, name=name: world.shift(name, seed=seed) for name in world.SHIFTS),
    ):
        assert make(0).fingerprint == make(0).fingerprint != make(1).fingerprint


def test_the_real_digits_are_the_same_everywhere():
    """Pinned: published numbers are about this split and these pixels."""
    assert world.digits("test").fingerprint[:16] == "222f38a84e81f0c3"


def test_splits_are_disjoint_complete_and_stratified():
    real = glyphs.enlarge(load_digits().images / 16)
    parts = {split: world.digits(split) for split in SPLITS}
    rows = [image.tobytes() for part in parts.values() for image in part.images]
    # Two of scikit-learn's images may be equal, so compare multisets with the whole set's.
    whole = world._dataset(real, load_digits().target, glyph=0, ground=1).images
    assert sorted(rows) == sorted(image.tobytes() for image in whole)
    share = np.bincount(load_digits().target) / 1797
    for split, n in SPLITS.items():
        counts = np.bincount(parts[split].labels.numpy(), minlength=10)
        assert counts.sum() == n and np.abs(counts - share * n).max() <= 1


def test_pixel_shifts_keep_the_test_digits_in_their_order():
    labels = world.digits("test").labels
    for name in world.SHIFTS[:-1]:
        assert torch.equal(world.shift(name).labels, labels)


def test_inverted_swaps_black_and_white():
    white_on_black, black_on_white = world.digits("test").images, world.shift("inverted").images
    total = white_on_black.astype(int) + black_on_white
    assert np.abs(total - sum(world.COLOURS["white"][:1] + world.COLOURS["black"][:1])).max() <= 1


def test_recoloured_grounds_are_plain_and_textured_ones_are_not():
    margin = np.ones((28, 28), bool)
    margin[2:-2, 2:-2] = False
    plain, textured = (world.shift(name).images[:, margin] for name in ("recoloured", "textured"))
    assert np.ptp(plain, axis=1).max() == 0
    assert np.ptp(textured, axis=1).max(axis=1).min() > 20


def test_rotated_turns_by_35_to_55_degrees_both_ways():
    """The direction of a long stroke, the one of the digit 1, from second moments."""
    upright, turned = world.digits("test"), world.shift("rotated")
    angles = []
    for a, b in zip(upright.images[upright.labels == 1], turned.images[turned.labels == 1], strict=True):
        axis = []
        for image in (a, b):
            weight = image[..., 0].astype(float) - 12
            y, x = (
                np.mgrid[:28, :28]
                - np.array([(weight * g).sum() / weight.sum() for g in np.mgrid[:28, :28]])[:, None, None]
            )
            xx, yy, xy = (weight * x * x).sum(), (weight * y * y).sum(), (weight * x * y).sum()
            axis.append(np.rad2deg(np.arctan2(2 * xy, xx - yy) / 2))
        angles.append((axis[0] - axis[1] + 90) % 180 - 90)
    assert 33 < np.abs(angles).min() and np.abs(angles).max() < 57
    assert min(angles) < 0 < max(angles)


def test_noise_has_the_documented_deviation():
    noise = world.shift("noisy").images.astype(float) - world.digits("test").images
    middle = (world.digits("test").images > 118) & (world.digits("test").images < 138)
    # Clipping to [0, 255] takes away from the 140 levels: compare with clipped noise of that deviation.
    expected = np.clip(128 + np.random.default_rng(0).normal(0, 140, 100_000), 0, 255).std()
    assert abs(noise[middle].mean()) < 2 and abs(noise[middle].std() - expected) < 1.5


def test_letters_leave_out_what_no_one_could_tell_from_a_digit():
    assert {name[-1] for name in world.ood("letters").classes} == set("abcdefghijklmnopqrstuvwxyz") - set("io")


@pytest.mark.parametrize("split", SPLITS)
def test_spurious_colours_are_aligned_as_documented(split):
    dataset = world.spurious(split)
    aligned = dataset.groups == dataset.labels // 2
    wrong = 0 if split == "test" else round(0.03 * len(dataset))
    assert int((~aligned).sum()) == wrong
    colours = torch.tensor([world.COLOURS[name] for name in world.SPURIOUS_COLOURS])[dataset.groups]
    assert np.array_equal(dataset.images[:, 0, 0], colours.numpy())


def test_conflicting_colours_are_never_the_class_s_own():
    dataset = world.spurious("test", conflicting=True)
    assert not (dataset.groups == dataset.labels // 2).any()
    assert torch.equal(dataset.labels, world.spurious("test").labels)
    with pytest.raises(ValueError, match="conflicting"):
        world.spurious("train", conflicting=True)


@pytest.mark.parametrize("make", [world.digits, world.shift, world.ood, world.spurious])
def test_unknown_names_are_refused_with_the_known_ones(make):
    with pytest.raises(ValueError, match="expected one of .*, got 'tset'"):
        make("tset")


def test_caption_pairs_are_equal_for_equal_seeds_and_describe_what_is_painted():
    one, two = world.caption_pairs(200, 7), world.caption_pairs(200, 7)
    assert np.array_equal(one.images, two.images) and one.captions == two.captions
    for caption, label in zip(one.captions, one.labels, strict=True):
        phrases = (world.NAMES[label], *world.CONCEPTS.get(world.NAMES[label], ()))
        assert any(phrase in caption for phrase in phrases)
        if any(phrase in caption for group in world.CONCEPTS.values() for phrase in group):
            assert "background" not in caption and not any(f" in {colour}" in caption for colour in world.COLOURS)


def test_concepts_name_every_class_and_tell_classes_apart():
    assert tuple(world.CONCEPTS) == world.CLASS_NAMES
    phrases = [phrase for group in world.CONCEPTS.values() for phrase in group]
    assert len(set(phrases)) == len(phrases)


# The dataset class


def test_tensors_are_the_pil_path_bit_for_bit():
    dataset = world.shift("textured").subset(range(40))
    piecewise = ImageDataset(
        dataset.images, dataset.labels, dataset.classes, transform=Compose([ToTensor(), Normalize(MEAN, STD)])
    )
    images, labels = next(iter(DataLoader(piecewise, batch_size=40)))
    whole = dataset.tensors(MEAN, STD)
    assert torch.equal(images, whole[0]) and torch.equal(labels, whole[1])


def test_the_bundled_transform_changes_nothing_but_the_statistics(bundle):
    dataset = world.shift("noisy").subset(range(8))
    expected = dataset.tensors(MEAN, STD)[0]
    assert torch.equal(torch.stack([bundle.eval_transform(dataset[i][0]) for i in range(8)]), expected)


def test_fingerprint_sees_pixels_labels_groups_and_classes_but_not_the_transform():
    base = dict(images=np.zeros((2, 4, 4, 3), np.uint8), labels=torch.tensor([0, 1]), classes=("a", "b"))
    pixel = base["images"].copy()
    pixel[1, 2, 3, 0] = 1
    variants = [
        base,
        base | {"images": pixel},
        base | {"labels": torch.tensor([1, 0])},
        base | {"classes": ("a", "c")},
        base | {"groups": torch.tensor([0, 1])},
    ]
    assert len({ImageDataset(**variant).fingerprint for variant in variants}) == len(variants)
    assert ImageDataset(**base, transform=ToTensor()).fingerprint == ImageDataset(**base).fingerprint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", np.zeros((2, 4, 4), np.uint8)),
        ("images", np.zeros((2, 4, 4, 3), np.float32)),
        ("labels", torch.tensor([0, 2])),
        ("labels", torch.tensor([0])),
        ("groups", torch.tensor([0.0, 1.0])),
    ],
)
def test_bad_fields_are_named(field, value):
    base = dict(images=np.zeros((2, 4, 4, 3), np.uint8), labels=torch.tensor([0, 1]), classes=("a", "b"))
    with pytest.raises(ValueError, match="labels" if field == "labels" else field):
        ImageDataset(**(base | {field: value}))


# The bundled model


def test_checkpoint_is_small_and_untouched():
    data = base_model.BUNDLED.read_bytes()
    assert len(data) <= 4 * 2**20
    assert hashlib.sha256(data).hexdigest() in base_model.BUNDLED.with_suffix(".md").read_text(encoding="utf-8")


def test_zero_shot_recognises_real_digits_it_has_never_seen(bundle, head):
    assert 0.65 <= accuracy(bundle, head, world.digits("test")) <= 0.82


def test_zero_shot_recognises_digits_in_a_font(bundle, head):
    assert accuracy(bundle, head, world.shift("font")) >= 0.9


def test_words_never_seen_carry_no_information(bundle):
    embedding = bundle.model.token_embedding.weight
    assert embedding.shape == (49408, 64) and int((embedding != 0).any(1).sum()) < 150
    tokens = bundle.tokenizer(["a photo of the zebra", "a photo of the giraffe"])
    with torch.no_grad():
        zebra, giraffe = clip.encode_texts(bundle.model, tokens)
    assert not torch.equal(tokens[0], tokens[1]) and torch.equal(zebra, giraffe)


def test_every_prompt_fits_the_context(bundle):
    texts = [*world.caption_pairs(2000, 3).captions, *(p for group in world.CONCEPTS.values() for p in group)]
    length = bundle.tokenizer.context_length
    assert max(len(bundle.tokenizer.encode(text)) + 2 for text in texts) <= length


def test_checkpoints_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain"):
        base_model.load_clip(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base_model.BUNDLED.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        base_model.load_clip(cut)
