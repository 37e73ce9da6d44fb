"""Pre-training on drawings: a function of its seed, exact when it is killed and resumed, or made longer."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from robustft.data.iconworld import corpus, model, pretrain, world
from robustft.data.iconworld.corpus import Words
from robustft.data.iconworld.pretrain import Said
from robustft.data.iconworld.rendering import on_white
from robustft.files import write_tensors

EAGLE, CAR = Words("eagle", ("bird", "sky"), "bird"), Words("car", ("road",), "vehicle")
STAR = Words("star")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of three emoji and two icons."""
    folder, generator = tmp_path_factory.mktemp("corpus"), torch.Generator().manual_seed(0)
    for name, channels, words in (("emoji-a", (4,), [EAGLE, CAR, EAGLE]), ("icons-b", (), [STAR, Words("car")])):
        pixels = torch.randint(256, (len(words), 48, 48, *channels), dtype=torch.uint8, generator=generator)
        write_tensors(folder / f"{name}.safetensors", {"pixels": pixels}, {"words": json.dumps(words)})
    texts = corpus.texts_of(folder)
    embeddings = F.normalize(torch.randn(len(texts), corpus.DIMENSIONS, generator=generator), dim=1)
    write_tensors(folder / corpus.WORDS, {"embeddings": embeddings.half()}, {"texts": json.dumps(texts)})
    return folder


@pytest.fixture
def short(monkeypatch):
    """Steps of six pairs, and two of words alone."""
    monkeypatch.setattr(pretrain, "BATCH", 6)
    monkeypatch.setattr(pretrain, "FURTHER", 3)
    monkeypatch.setattr(pretrain, "WORDS_FIRST", 2)


def run(folder, path, *, steps=4, kill_after=None):
    def progress(now):
        if kill_after is not None and now.seen == 6 * kill_after:
            raise Killed

    return pretrain.pretrain(folder, path, pairs=6 * steps, progress=progress, save_every=6)


def test_unknowns_within_a_corpus_are_counted():
    bundled = world.drawings()
    letters = [bundled.rows[row.drawing] for row in world.rows("kinds") if row.split == "ood:letters"]
    names = [(drawn.concept, "a letter") for drawn in letters[:3]]
    found = corpus.unknowns_within({letters[0].studio: ({}, [*names, ("no letter", "")])})
    assert found["letters"] == (3, len(letters)) and found["flags"][0] == found["symbols"][0] == 0
    assert sum(within for within, _ in corpus.unknowns_within({"another": ({}, names)}).values()) == 0


def test_a_killed_run_resumes_bit_for_bit_and_so_does_a_longer_one(short, folder, tmp_path):
    whole = run(folder, tmp_path / "whole", steps=2).read_bytes()
    with pytest.raises(Killed):
        run(folder, tmp_path / "killed", steps=9, kill_after=1)
    assert run(folder, tmp_path / "killed", steps=2).read_bytes() == whole
    model.load_clip(tmp_path / "killed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_the_card_of_an_unfinished_run_says_what_it_saw(short, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "zero_shot", lambda path: {"noto": pretrain.Accuracy(12.34, None)})
    path = tmp_path / "model.safetensors"
    with pytest.raises(Killed):
        run(folder, path, steps=9, kill_after=1)
    pretrain.main(["--corpus", str(folder), "--card", str(path)])
    card = path.with_suffix(".md").read_text()
    assert "saw | 6 image-caption pairs from seed 0: each emoji 0.9 times, each icon 1.7 times" in card
    assert "had not begun to fall" in card and "--pairs 54 --dropped 0.4" in card
    assert "| noto | no | 12.3 |  |" in card and hashlib.sha256(path.read_bytes()).hexdigest() in card


def test_a_run_whose_rate_has_fallen_is_not_made_longer(short, folder, tmp_path):
    with pytest.raises(Killed):
        run(folder, tmp_path / "model", steps=2, kill_after=2)
    with pytest.raises(ValueError, match="cannot go on with seed 0, 54 pairs and 0.4 dropped"):
        run(folder, tmp_path / "model", steps=9)


def test_a_corpus_that_is_none_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus"):
        pretrain.pretrain(tmp_path, tmp_path / "model", pairs=10_000)
    with pytest.raises(ValueError, match="at least one batch of 256, got 10"):
        pretrain.pretrain(tmp_path, tmp_path / "model", pairs=10)
    with pytest.raises(ValueError, match="dropped is a share"):
        pretrain.pretrain(tmp_path, tmp_path / "model", pairs=1000, dropped=1.0)


def test_a_caption_is_true_of_images_of_its_name_or_of_its_kind():
    captions = [Said("an eagle", "eagle", ""), Said("a bird", "", "bird"), Said("an eagle, bird", "eagle", "bird")]
    captions += [Said("a car", "car", "")]
    true = pretrain.true_of([EAGLE, CAR, STAR, Words("car"), Words("owl", (), "bird")], captions)
    expected = [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert torch.equal(true, torch.tensor(expected).bool())


def test_captions_say_what_they_claim_to():
    rng = np.random.default_rng(0)
    captions = [pretrain.caption(EAGLE, rng) for _ in range(200)]
    assert {(one.name, one.kind) for one in captions} == {("eagle", ""), ("eagle", "bird"), ("", "bird")}
    for one in captions:
        assert all(text in one.text for text in (one.name, one.kind, *one.tags))
    assert all(pretrain.caption(STAR, rng).name == "star" for _ in range(20))


def test_the_loss_of_captions_that_all_differ_is_clip_s():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=-1) for _ in range(2))
    loss = pretrain.losses(image, text, torch.eye(5).bool(), torch.tensor(7.0))
    logits, target = 7 * image @ text.T, torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, expected)


def test_a_caption_that_is_true_of_no_image_is_only_one_more_to_be_told_apart():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (4, 5))
    true = torch.eye(4, 5).bool()
    loss = pretrain.losses(image, text, true, torch.tensor(7.0))
    logits, target = 7 * image @ text.T, torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :4].T, target)) / 2
    torch.testing.assert_close(loss, expected)


def test_the_rate_rises_stays_and_falls_in_the_end_alone():
    rates = [pretrain.rate(step, 10_000) for step in range(-pretrain.WORDS_FIRST, 10_001)]
    assert max(rates) == pretrain.LEARNING_RATE and rates[-1] == 0
    assert rates[pretrain.WORDS_FIRST] < rates[pretrain.WORDS_FIRST - 1]  # images come in slowly
    last = pretrain.stable_steps(10_000)
    assert pretrain.rate(last, 10_000) == pretrain.rate(last - 1, 20_000) > pretrain.rate(last + 1, 10_000)
    assert math.isclose(last, 8500)


def test_painted_drawings_are_images_that_differ_each_time():
    square = torch.zeros(48, 48, 4, dtype=torch.uint8)
    square[12:36, 12:36] = torch.tensor([255, 0, 0, 255])
    drawn = [square, square[..., 3]] * 40
    images = pretrain.painted(drawn, 40, torch.Generator().manual_seed(0))
    assert images.shape == (80, 3, 40, 40) and images.min() >= 0 and images.max() <= 1
    assert images.isfinite().all() and (images.std((1, 2, 3)) > 0.01).double().mean() > 0.9
    assert len(torch.unique(images, dim=0)) == 80
    assert torch.equal(images, pretrain.painted(drawn, 40, torch.Generator().manual_seed(0)))


def test_without_strength_a_drawing_is_painted_as_it_is_on_white():
    image = torch.randint(256, (48, 48, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[..., 3] = image[:1, :1, 3]  # one opacity: what is premultiplied is sampled
    painted = pretrain.painted([image] * 8, 48, torch.Generator().manual_seed(0), 0.0)
    expected = torch.from_numpy(on_white(image.numpy())).permute(2, 0, 1) / 255
    for found in painted:
        assert min((found - side).abs().max() for side in (expected, expected.flip(2))) < 0.005
