"""Pre-training: a function of its seed, and exact when it is killed and resumed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from robustft.data import glyphworld, pretrain
from robustft.data.base_model import load_clip


class Killed(Exception):
    pass


def run(path, *, seed=0, steps=4, kill_after=None):
    def progress(now):
        if kill_after is not None and now.seen == kill_after * pretrain.BATCH:
            raise Killed

    return pretrain.pretrain(
        path, seed=seed, pairs=steps * pretrain.BATCH, progress=progress, save_every=pretrain.BATCH
    )


def digest(path):
    return {name: value.clone() for name, value in load_clip(path).model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing stopped."""
    return digest(run(tmp_path_factory.mktemp("pretrain") / "whole"))


@pytest.mark.exhaustive
def test_equal_seeds_give_equal_weights_and_another_seed_others(tmp_path, whole):
    same, other = digest(run(tmp_path / "same")), digest(run(tmp_path / "other", seed=1))
    assert all(torch.equal(whole[name], same[name]) for name in whole)
    assert not torch.equal(whole["visual.proj"], other["visual.proj"])


def test_a_killed_run_resumes_bit_for_bit(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_after=3)
    assert (tmp_path / "killed.state").exists()
    resumed = digest(run(tmp_path / "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed"]


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "model", kill_after=3)
    with pytest.raises(ValueError, match="seed 0 and 256 pairs, not 1 and 256"):
        run(tmp_path / "model", seed=1)


def test_the_caller_s_random_state_and_threads_are_left_alone(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path / "model", steps=1)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


def test_losses_over_different_captions_equal_the_plain_clip_loss_when_all_differ():
    torch.manual_seed(0)
    image, text, classes = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (5, 5, 3))
    own, labels, scale = torch.tensor([3, 1, 0, 4, 2]), torch.tensor([0, 2, 1, 1, 0]), torch.tensor(7.0)
    contrastive, class_loss = pretrain.losses(image, text, own, classes, labels, scale)
    logits = 7 * image @ text[own].T
    target = torch.arange(5)
    plain = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive, plain)
    torch.testing.assert_close(class_loss, F.cross_entropy(7 * image @ classes.T, labels))


def test_equal_captions_share_their_target():
    image, text = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:2]
    own, scale = torch.tensor([0, 0, 1]), torch.tensor(1.0, dtype=torch.float64)
    contrastive, _ = pretrain.losses(image, text, own, text, own, scale)
    z = image @ text.T
    rows, columns = z.log_softmax(1), z.log_softmax(0)
    expected = -(rows[0, 0] + rows[1, 0] + rows[2, 1]) / 6 - (columns[0, 0] + columns[1, 0] + columns[2, 1]) / 6
    torch.testing.assert_close(contrastive, expected)


def test_every_caption_is_inside_the_stored_vocabulary():
    captions = pretrain.Captions()
    for seed in range(5):
        captions(glyphworld.caption_pairs(400, seed).captions)
    with pytest.raises(ValueError, match="vocabulary"):
        captions(["a photo of the zebra"])
