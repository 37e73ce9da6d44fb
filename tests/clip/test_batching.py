"""Images that go through a tower by parts: the same features, and whole where the tower may look at them together."""

from __future__ import annotations

import threading

import pytest
import torch

from robustft import clip
from robustft.clip import batching


@pytest.fixture
def images():
    return torch.randn(150, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def seen(clip_model, monkeypatch):
    """How many images the tower was given at a time, and in which threads."""
    found = []
    encode = clip_model.encode_image

    def encode_image(part):
        found.append((len(part), threading.current_thread()))
        return encode(part)

    monkeypatch.setattr(clip_model, "encode_image", encode_image)
    return found


def with_threads(monkeypatch, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    batching._pool.cache_clear()


@pytest.mark.parametrize(
    ("threads", "sizes"), [(1, [22, 64, 64]), (2, [37, 37, 38, 38]), (3, [50, 50, 50]), (8, [150])]
)
def test_features_by_parts_are_those_of_all_images(clip_model, images, seen, monkeypatch, threads, sizes):
    clip_model.eval()
    expected = clip.encode_images(clip_model, images)
    assert len(seen) == 1  # with a gradient
    with_threads(monkeypatch, threads)
    with torch.no_grad():
        found = clip.encode_images(clip_model, images)
    assert sorted(size for size, _ in seen[1:]) == sizes
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    apart = {thread for _, thread in seen[1:]} - {threading.main_thread()}
    assert bool(apart) == (1 < threads <= batching.FEW) and not found.requires_grad
    with torch.inference_mode():
        assert clip.encode_images(clip_model, images).is_inference()


def test_errors_of_threads_name_the_images(clip_model, monkeypatch):
    with_threads(monkeypatch, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="do not go through the model's encode_image"):
        clip.encode_images(clip_model.eval(), torch.randn(150, 3, 12, 12))


def test_all_images_go_together_where_they_may_be_looked_at_together(clip_model, images, seen, monkeypatch):
    with_threads(monkeypatch, 2)
    with torch.no_grad():
        clip.encode_images(clip_model.train(), images)
        clip.encode_images_and_patches(clip_model.eval(), images)
    assert [size for size, _ in seen] == [150, 150]


def test_a_large_tower_is_not_given_to_several_threads(clip_model, images, seen, monkeypatch):
    with_threads(monkeypatch, 2)
    monkeypatch.setattr(batching, "SMALL", 100)
    with torch.no_grad():
        clip.encode_images(clip_model.eval(), images)
    assert seen == [(128, threading.main_thread()), (22, threading.main_thread())]
