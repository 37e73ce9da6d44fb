"""AdaNeg's memory against its definition in loops over images, lists and entries, in float64; and as a detector's."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robustft import Detector
from robustft.clip.outputs import outputs_of
from robustft.detection import AdaNegMemory
from robustft.detection.scores import neg_label


def unit(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


K, TAU = 4, 0.05
CLASSES, NEGATIVES = unit(K, seed=1), unit(9, seed=2)
TEXTS = torch.cat([CLASSES, NEGATIVES])
OPTIONS = {"length": 3, "temperature": TAU, "groups": 2}
STREAM = F.normalize(TEXTS[torch.arange(90) % 13] + 0.35 * unit(90, seed=3), dim=1)


def by_hand(batches, length=3, beta=5.5, threshold=0.5, gap=0.5, weight=0.1):
    """Scores of each batch, and the lists in the end: entropies and images of each, in the order of their coming."""
    texts, lists, found = TEXTS.numpy(), [[] for _ in TEXTS], []

    def scored(cosines):
        return neg_label(cosines[:, :K], cosines[:, K:], TAU, 2)

    for batch in batches:
        plain = scored(batch @ TEXTS.T)
        for v, s in zip(batch.numpy(), plain.tolist(), strict=True):
            if s > threshold + gap * (1 - threshold):
                first, part = 0, texts[:K] @ v
            elif s < threshold - gap * threshold:
                first, part = K, texts[K:] @ v
            else:
                continue
            p = np.exp(part / TAU) / np.exp(part / TAU).sum()
            h, kept = -(p * np.log(p)).sum(), lists[first + part.argmax()]
            if len(kept) < length:
                kept.append((h, v))
                continue
            worst = max(range(length), key=lambda i: kept[i][0])
            if h < kept[worst][0]:
                kept[worst] = (h, v)
        cosines = np.empty((len(batch), len(texts)))
        for j, kept in enumerate(lists):
            entries = np.stack([texts[j], *(f for _, f in kept)])
            for i, v in enumerate(batch.numpy()):
                proxy = (np.exp(-beta * (1 - entries @ v))[:, None] * entries).sum(0)
                cosines[i, j] = proxy @ v / np.linalg.norm(proxy)
        found.append(scored(torch.from_numpy(cosines)) + weight * plain)
    return torch.cat(found), lists


@pytest.mark.parametrize("options", [{}, {"beta": 0.0, "weight": 1.0}, {"threshold": 0.3, "gap": 0.1, "length": 1}])
@pytest.mark.parametrize("size", [1, 50])
def test_scores_and_memory_are_those_of_the_definition_image_by_image(options, size):
    memory = AdaNegMemory(CLASSES, NEGATIVES, **{**OPTIONS, **options})
    batches = STREAM.split(size)
    expected, lists = by_hand(batches, **{"length": 3, **options})
    found = torch.cat([memory.update(batch).scores(batch) for batch in batches])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert memory.counts.tolist() == [len(kept) for kept in lists]
    assert (
        memory.counts[:K].max() == memory.counts[K:].max() == {**OPTIONS, **options}["length"]
    )  # and some came too late
    kept = [torch.from_numpy(f) for images in lists for _, f in sorted(images, key=lambda pair: pair[0])]
    torch.testing.assert_close(memory.state()["features"], torch.stack(kept), rtol=0, atol=0)


def test_an_empty_memory_scores_as_neg_label_does():
    memory = AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS)
    plain = neg_label(STREAM @ CLASSES.T, STREAM @ NEGATIVES.T, TAU, 2)
    torch.testing.assert_close(memory.scores(STREAM), 1.1 * plain)
    full = memory.update(STREAM).scores(STREAM)
    assert (full - 1.1 * plain).abs().max() > 0.01
    memory.reset()
    assert len(memory) == 0
    assert torch.equal(memory.scores(STREAM), AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS).scores(STREAM))


def test_the_memory_does_not_depend_on_the_batches_and_comes_back_from_its_state():
    whole = AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS).update(STREAM)
    parts = AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS)
    for batch in STREAM[:56].split(7):
        parts.update(batch)
    restored = AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS)
    restored.restore(parts.state())
    restored.update(STREAM[56:])
    for name, value in whole.state().items():
        torch.testing.assert_close(restored.state()[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(restored.scores(STREAM), whole.scores(STREAM))


def test_of_equal_entropies_the_image_that_came_first_stays():
    memory = AdaNegMemory(torch.eye(6)[:2], torch.eye(6)[2:4], length=1, groups=1)
    first, second = (torch.tensor([[0.8, 0.0, 0.0, 0.0, *end]]) for end in ((0.6, 0.0), (0.0, 0.6)))
    assert torch.equal(memory.update(first).update(second).state()["features"], first)


def test_a_sharp_beta_takes_the_nearest_entry_of_each_list_and_opposite_entries_give_finite_scores():
    memory = AdaNegMemory(CLASSES, NEGATIVES, **{**OPTIONS, "beta": 1e7}).update(STREAM)
    state, both = memory.state(), torch.cat([STREAM, -STREAM])
    nearest = both @ TEXTS.T
    for feature, j in zip(state["features"], state["lists"].tolist(), strict=True):
        nearest[:, j] = torch.maximum(nearest[:, j], both @ feature)
    plain = neg_label(both @ CLASSES.T, both @ NEGATIVES.T, TAU, 2)
    torch.testing.assert_close(memory.scores(both), neg_label(nearest[:, :K], nearest[:, K:], TAU, 2) + 0.1 * plain)
    flat = AdaNegMemory(CLASSES, NEGATIVES, **{**OPTIONS, "beta": 0.0})
    flat.restore({"features": -TEXTS[:1], "entropies": torch.zeros(1), "lists": torch.zeros(1, dtype=torch.long)})
    assert flat.scores(STREAM).isfinite().all()


def test_misuse_of_a_memory_is_named():
    memory = AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS).update(STREAM)
    state = memory.state()
    cases = [
        (lambda: memory.update(unit(3, 5)), "features are 5 wide, expected 6"),
        (lambda: memory.scores(2 * unit(3)), "features must have rows of unit norm, got one of norm 2"),
        (lambda: memory.scores(unit(3) * torch.nan), "unit norm, got one of norm nan"),
        (lambda: AdaNegMemory(CLASSES, unit(9, 5)), "negative_embeddings are 5 wide, expected 6"),
        (lambda: AdaNegMemory(CLASSES, 3 * NEGATIVES), "negative_embeddings must have rows of unit norm"),
        (lambda: AdaNegMemory(CLASSES[0], NEGATIVES), r"class_embeddings is a tensor \(6,\)"),
        (lambda: AdaNegMemory(CLASSES, NEGATIVES, groups=10), "groups must lie between 1 and"),
        (lambda: AdaNegMemory(CLASSES, NEGATIVES, gap=2.0), "gap must lie in"),
        (lambda: AdaNegMemory(CLASSES, NEGATIVES, beta=-1.0), "beta must be finite"),
        (lambda: AdaNegMemory(CLASSES, NEGATIVES, length=0), "length is 0"),
        (lambda: memory.restore({"features": TEXTS}), "state has no 'entropies'"),
        (lambda: memory.restore({**state, "lists": state["lists"] + 9}), r"must lie in \[0, 13\)"),
        (lambda: memory.restore({**state, "lists": state["lists"] * 0}), "a list of .* images; expected at most"),
        (lambda: memory.restore({**state, "entropies": state["entropies"][1:]}), "one a feature"),
        (lambda: memory.restore({**state, "entropies": state["entropies"] * torch.inf}), "must be finite"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def outputs(u):
    return outputs_of(u, 3 * CLASSES, 20.0)


def detector(**options):
    texts = {"class_embeddings": 3 * CLASSES, "negative_embeddings": NEGATIVES}
    return Detector("ada_neg", **{**texts, "batch": 16, **OPTIONS, **options})


def test_a_detector_scores_every_call_as_a_stream_that_begins_empty_in_batches_of_its_own():
    fitted = detector().fit(outputs(STREAM[:50]))
    memory = AdaNegMemory(CLASSES, NEGATIVES, **OPTIONS)
    expected = torch.cat([memory.update(batch).scores(batch) for batch in STREAM.split(16)])
    for _ in range(2):
        torch.testing.assert_close(fitted.scores(outputs(STREAM)), expected)
    images = types.SimpleNamespace(outputs=lambda images: outputs(images.flatten(1)))
    for size in (7, 11, 100):
        torch.testing.assert_close(fitted.scores(images, STREAM[..., None, None], batch_size=size), expected)
    assert fitted.memory is None


def test_a_stream_keeps_its_memory_over_calls_until_it_is_reset(tmp_path):
    fitted = detector().fit(outputs(STREAM[:50]))
    stream = fitted.stream()
    first, second = (stream.scores(outputs(part)) for part in (STREAM[:48], STREAM[48:]))
    torch.testing.assert_close(torch.cat([first, second]), fitted.scores(outputs(STREAM)))
    assert not torch.equal(stream.scores(outputs(STREAM[:48])), first)
    stream.memory.reset()
    assert torch.equal(stream.scores(outputs(STREAM[:48])), first)
    held = len(stream.memory)
    assert stream.fit(outputs(STREAM[:50])).threshold_ == fitted.threshold_ and len(stream.memory) == held
    assert Detector.load(stream.save(tmp_path)).memory is None
    with pytest.raises(ValueError, match="score 'mcm' remembers no images"):
        Detector().stream()


def test_a_detector_names_the_texts_that_are_missing_or_of_another_model():
    ready = outputs(STREAM)
    cases = [
        ({"class_embeddings": None}, "has no class_embeddings: pass class_embeddings"),
        ({"negative_embeddings": None}, "has no negative_embeddings: pass negative_embeddings"),
        ({"negative_embeddings": unit(9, 5)}, "negative_embeddings are 5 wide, expected 6"),
        ({"class_embeddings": unit(5)}, "class_embeddings are of 5 classes, the cosines of 4"),
        ({"class_embeddings": CLASSES.flip(0)}, "class_embeddings give cosines that differ by .* pass the class_embed"),
        ({"class_embeddings": unit(4, 5), "negative_embeddings": unit(9, 5)}, "features are 6 wide, expected 5"),
        ({"batch": 0}, "batch is 0; expected at least 1"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            detector(**options).fit(ready)
    with pytest.raises(TypeError, match="AdaNegMemory has no option 'lamda'; it has .*'weight'"):
        detector(lamda=1.0)
