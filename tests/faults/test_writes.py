"""A fault at every sync and rename of a checkpoint and of a feature cache: a full disk, Ctrl-C, a kill."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from robustft import clip
from robustft.files import is_unfinished
from robustft.training.checkpoint import discard_unfinished, latest_checkpoint, save_checkpoint

CALLS = ("fsync", "replace", "rename")
FAULTS = ("full disk", "ctrl-c", "kill")


def fails_at(number, fault, write):
    """Whether the call of this number came, and so failed; a kill is that of a forked child."""
    if fault == "kill":
        child = os.fork()
        if child == 0:
            try:
                _run(number, lambda: os._exit(9), write)
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    def strike():
        raise OSError(28, "No space left on device") if fault == "full disk" else KeyboardInterrupt

    try:
        _run(number, strike, write)
    except (OSError, KeyboardInterrupt):
        return True
    return False


def _run(number, strike, write):
    count = iter(range(10_000))
    with pytest.MonkeyPatch.context() as patch:
        for name, original in [(name, getattr(os, name)) for name in CALLS]:

            def call(*arguments, original=original, **options):
                if next(count) == number:
                    strike()
                return original(*arguments, **options)

            patch.setattr(os, name, call)
        write()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_is_that_before_or_the_new_one(tmp_path, fault):
    states = [{"method.a": torch.full((3,), float(step))} for step in range(2)]
    for number in range(100):
        folder = tmp_path / str(number)
        save_checkpoint(folder, 0, states[0], {})
        failed = fails_at(number, fault, lambda folder=folder: save_checkpoint(folder, 1, states[1], {}))
        if fault != "kill":
            assert all(path.name.startswith("step_") for path in folder.iterdir()), number
        found = latest_checkpoint(folder)
        assert torch.equal(found.tensors["method.a"], states[found.step]["method.a"])
        discard_unfinished(folder)
        assert not any(map(is_unfinished, folder.iterdir()))
        assert failed or found.step == 1
        save_checkpoint(folder, 1, states[1], {})
        assert latest_checkpoint(folder).step == 1
        if not failed:
            break
    assert 5 < number < 99


@pytest.mark.parametrize("fault", FAULTS)
def test_a_feature_cache_is_whole_or_absent(tmp_path, fault, clip_model):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    expected = clip.encode(clip_model, images)
    for number in range(100):
        cache = tmp_path / str(number)
        failed = fails_at(number, fault, lambda cache=cache: clip.encode(clip_model, images, cache=cache))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a damaged file
            found = clip.encode(clip_model, images, cache=cache)
        assert torch.equal(found.image_features, expected.image_features)
        assert fault == "kill" or not any(map(is_unfinished, cache.iterdir()))
        if not failed:
            break
    assert 2 < number < 99
