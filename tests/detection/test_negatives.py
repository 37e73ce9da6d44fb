"""Negative texts by CSP's recipe: which candidates there are, which are left out, which are chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robustft import clip
from robustft.detection import conjugated_negatives, conjugated_phrases
from robustft.testing import CLASSES, letters, tiny_world

WORLD = tiny_world()
MODEL, TEMPLATES = WORLD.model.eval(), WORLD.prompts["templates"]
with torch.no_grad():
    HEAD = clip.class_embeddings(MODEL, letters, CLASSES, TEMPLATES)


def test_phrases_are_every_adjective_with_every_superclass_word_once_or_with_some_drawn_by_seed():
    assert conjugated_phrases(("red", "old", "red"), ("thing", "place")) == (
        *("red thing", "red place", "old thing", "old place"),
    )
    words = [f"w{i}" for i in range(20)]
    drawn = conjugated_phrases(words, ("thing", "place", "view"), each=2, seed=3)
    assert len(drawn) == len(set(drawn)) == 40 and drawn == conjugated_phrases(words, ("thing", "place", "view"), 2, 3)
    assert drawn != conjugated_phrases(words, ("thing", "place", "view"), 2, 4)


def by_hand(words, share, most_alike):
    """The words that are left, and of these the chosen."""
    rows = []
    with torch.no_grad():
        for word in words:
            texts = clip.encode_texts(MODEL, letters([template.format(word) for template in TEMPLATES]))
            rows.append(F.normalize(F.normalize(texts, dim=1).mean(0), dim=0))
    alike = {word: row @ HEAD.T for word, row in zip(words, rows, strict=True)}
    left = [word for word in words if alike[word].max() <= most_alike]
    left.sort(key=lambda word: float(alike[word].quantile(0.95)))
    return left[: max(1, round(share * len(left)))]


def test_of_nouns_and_of_phrases_the_least_alike_are_chosen_and_other_names_of_classes_left_out():
    nouns = [*CLASSES, *(chr(97 + i) + chr(110 - i) for i in range(12))]
    phrases = conjugated_phrases([chr(98 + i) * 2 for i in range(9)], ("ox", "zoo"))
    limit = 0.98
    found = conjugated_negatives(
        MODEL, letters, 7 * HEAD, phrases, TEMPLATES, nouns=nouns, share=0.4, most_alike=limit, batch_size=5
    )
    assert found.texts == (*by_hand(nouns, 0.4, limit), *by_hand(phrases, 0.4, limit))
    with torch.no_grad():
        expected = clip.class_embeddings(MODEL, letters, found.texts, TEMPLATES)
    torch.testing.assert_close(found.embeddings, expected)
    every = conjugated_negatives(MODEL, letters, HEAD, (), TEMPLATES, nouns=nouns, share=1.0, most_alike=limit)
    assert 0 < len(every.texts) < len(nouns) and not set(every.texts) & set(CLASSES)
    assert float((every.embeddings @ HEAD.T).max()) <= limit


def test_misuse_of_candidates_is_named():
    cases = [
        (lambda: conjugated_phrases((), ("thing",)), "adjectives is .*; expected some words"),
        (lambda: conjugated_phrases(("red", " "), ("thing",)), "adjectives hold a blank word"),
        (lambda: conjugated_phrases(("red",), ("thing",), each=2), "each is 2; expected at most 1"),
        (lambda: conjugated_negatives(MODEL, letters, HEAD, (), TEMPLATES), "phrases and nouns are empty"),
        (lambda: conjugated_negatives(MODEL, letters, HEAD[:, 1:], ("a b",), TEMPLATES), r"expected \(K, 8\)"),
        (lambda: conjugated_negatives(MODEL, letters, HEAD, CLASSES, TEMPLATES), "phrases are all too like a class"),
        (lambda: conjugated_negatives(MODEL, letters, HEAD, ("a",), TEMPLATES, share=0.0), "share must lie in"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
