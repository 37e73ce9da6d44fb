"""Negative texts for NegLabel and AdaNeg by CSP's recipe, a conjugated semantic pool: candidates, and their choice.

candidates   nouns as they are; an adjective with a word for a whole category, as in "striped object"
embeddings   n (C, D): of each candidate, the unit mean over templates, as the classes' own
left out     candidates like a class:  max_k n w_k > `most_alike`
chosen       of the nouns, and of the phrases, the `share` least like the classes (`scores.select_negatives`)

A phrase names what an image can show, and goes with many kinds of image. A bare adjective does not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.prompts import Template, Tokenizer
from robustft.detection.scores import select_negatives
from robustft.ops.arguments import array, check_count, checked, described


class Negatives(NamedTuple):
    """Negative texts: the words (M), and their embeddings (M, D) of unit rows."""

    texts: tuple[str, ...]
    embeddings: Tensor


@checked
def conjugated_phrases(
    adjectives: Sequence[str], superclasses: Sequence[str], each: int | None = None, seed: int = 0
) -> tuple[str, ...]:
    """Every adjective with every superclass word, such as "creature", "place" or "object"; each phrase once.

    each: so many superclass words an adjective, drawn anew for every one by `seed`; None takes all. ValueError for
    blank words, and for `each` beyond them. Source: CSP (Chen et al., NeurIPS 2024). There are no words by default:
    give some that fit the images that may come.
    """
    first, second = (
        _words(name, words) for name, words in (("adjectives", adjectives), ("superclasses", superclasses))
    )
    if each is not None:
        check_count("each", each, len(second))
    draw = random.Random(seed)
    pairs = ((one, other) for one in first for other in (second if each is None else draw.sample(second, each)))
    return tuple(dict.fromkeys(f"{one} {other}" for one, other in pairs))


@checked
def conjugated_negatives(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_embeddings: Tensor,
    phrases: Sequence[str],
    templates: Sequence[Template],
    *,
    nouns: Sequence[str] = (),
    share: float = 0.15,
    most_alike: float = 0.95,
    percentile: float = 0.95,
    batch_size: int = 256,
) -> Negatives:
    """Negative texts for `Detector("neg_label", negative_embeddings=)`, out of phrases and nouns: CSP.

    Args:
        model, tokenizer: the model that will be scored, whose text tower reads the candidates.
        class_embeddings: (K, D), of the classifier that will be scored; they are normalised here.
        phrases: such as `conjugated_phrases` gives. nouns: more candidates. share: of each of both kinds, how many of
            those that are left are taken, at least one.
        templates: as for the classes; every candidate is the mean over them.
        most_alike: a candidate with a larger cosine to a class is left out, as another name of it.
        percentile: of `select_negatives`.

    Memory: C D floats for C candidates. No gradient. ValueError where nothing is left. Source: CSP (Chen et al.,
    NeurIPS 2024), on NegLabel (arXiv 2403.20078).
    """
    for name, value in (("share", share), ("most_alike", most_alike)):
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    if not len(phrases) and not len(nouns):
        raise ValueError("phrases and nouns are empty: there must be at least one candidate")
    if array("class_embeddings", class_embeddings).ndim != 2 or not class_embeddings.is_floating_point():
        raise ValueError(f"class_embeddings is {described(class_embeddings)}; expected floating (K, D)")
    classes = nn.functional.normalize(class_embeddings.detach(), dim=-1)
    texts: list[str] = []
    rows: list[Tensor] = []
    for kind, words in (("nouns", nouns), ("phrases", phrases)):
        if not len(words):
            continue
        candidates = _words(kind, words)
        with torch.no_grad():
            embeddings = clip.class_embeddings(model, tokenizer, candidates, templates, batch_size=batch_size)
        if classes.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"class_embeddings are {tuple(classes.shape)}, expected (K, {embeddings.shape[1]}), as the model's text"
            )
        classes = classes.to(embeddings)
        other = [i for i, one in enumerate(embeddings.split(1024)) for i in _unlike(one, classes, most_alike, 1024 * i)]
        if not other:
            raise ValueError(
                f"{kind} are all too like a class: none has cosines of at most {most_alike} with all classes"
            )
        kept = torch.tensor(other, device=embeddings.device)
        chosen = kept[select_negatives(embeddings[kept], classes, max(1, round(share * len(kept))), percentile)]
        texts += [candidates[i] for i in chosen.tolist()]
        rows.append(embeddings[chosen])
    return Negatives(tuple(texts), torch.cat(rows))


def _unlike(rows: Tensor, classes: Tensor, most: float, first: int) -> list[int]:
    return [first + i for i in ((rows @ classes.T).amax(1) <= most).nonzero()[:, 0].tolist()]


def _words(name: str, words: Sequence[str]) -> list[str]:
    """Words, each once, or an error."""
    if isinstance(words, str) or not len(words):
        raise ValueError(f"{name} is {words!r:.40}; expected some words")
    if blank := [word for word in words if not word.strip()]:
        raise ValueError(f"{name} hold a blank word, {blank[0]!r}")
    return list(dict.fromkeys(words))
