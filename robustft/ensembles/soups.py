"""Model soups: one classifier from several fine-tunings of one model (Wortsman et al., ICML 2022, arXiv 2203.05482).

theta = mean of theta_m                  all weights, the head s w with its scale inside, bias and scale
uniform: over all;   greedy: the best on held-out ID data first, then each next that does not make the mean worse
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustft import clip
from robustft.ops.kinds import described
from robustft.predictors.base import Classifier
from robustft.predictors.logits import accuracy_and_nll


class GreedySoup(NamedTuple):
    """A soup, which classifiers went into it (indices, best first), and each one's own validation accuracy."""

    classifier: Classifier
    ingredients: tuple[int, ...]
    accuracies: tuple[float, ...]


def uniform_soup(classifiers: Sequence[Classifier]) -> Classifier:
    """The mean of classifiers of one architecture over the same classes, with its own copy of the model.

    Runs of one method, or of several from the same pre-trained model; the mean of models with different beginnings
    is useless. An absent bias counts as 0. Integer buffers are the first's. Means are taken in at least float32;
    what is equal in all stays as it is. Memory: one more model.

    ValueError for no classifiers, other classes, weights that do not match, naming them, and models that compute
    different things with theirs (`clip.check_same_computation`).

    Source: Wortsman et al., model soups (ICML 2022, arXiv 2203.05482), section 2.
    """
    _check_listed(classifiers)
    if not classifiers:
        raise ValueError("classifiers is empty: a soup needs at least one")
    _check_alike(classifiers)
    first = classifiers[0]
    scale = _mean([c.logit_scale for c in classifiers])
    head = _mean([c.logit_scale * c.class_embeddings for c in classifiers])
    biases = [c.bias for c in classifiers]
    bias = None
    if any(b is not None for b in biases):
        bias = _mean([head.new_zeros(len(head)) if b is None else b for b in biases])
    model = copy.deepcopy(clip.unwrap(first.model))
    model.load_state_dict(clip.average_states(clip.unwrap(c.model).state_dict() for c in classifiers))
    for i, classifier in enumerate(classifiers):
        clip.check_same_computation(model, classifier.model, "classifiers[0]", f"classifiers[{i}]")
    return Classifier(model, head / scale, first.classes, logit_scale=scale, bias=bias)


def greedy_soup(classifiers: Sequence[Classifier], validation: Any) -> GreedySoup:
    """The soup of those classifiers that help on held-out ID data, (images, labels) or a dataset.

    In the order of their accuracy (of equals the lower NLL, then the first), each is added if the mean's accuracy does
    not fall, as in the paper. At least as accurate there as the best alone. Memory: two more models.

    Source: Wortsman et al., model soups (ICML 2022, arXiv 2203.05482), recipe 1.
    """
    _check_listed(classifiers)
    if not classifiers:
        raise ValueError("classifiers is empty: a soup needs at least one")
    _check_alike(classifiers)  # before the work
    scores = [_score(classifier, validation) for classifier in classifiers]
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i][0], scores[i][1]))
    kept = best_first[:1]
    soup, accuracy = uniform_soup([classifiers[kept[0]]]), scores[kept[0]][0]
    for i in best_first[1:]:
        trial = uniform_soup([classifiers[m] for m in (*kept, i)])
        trial_accuracy, _ = _score(trial, validation)
        if trial_accuracy >= accuracy:
            soup, accuracy, kept = trial, trial_accuracy, [*kept, i]
    return GreedySoup(soup, tuple(kept), tuple(a for a, _ in scores))


def _check_listed(classifiers: Any) -> None:
    if isinstance(classifiers, str) or not isinstance(classifiers, Sequence):
        raise TypeError(f"classifiers is {described(classifiers)}; expected a sequence of Classifiers")


def _check_alike(classifiers: Sequence[Classifier]) -> None:
    """TypeError for what is no classifier, ValueError for one over other classes than the first's."""
    for i, classifier in enumerate(classifiers):
        if not isinstance(classifier, Classifier):
            raise TypeError(
                f"classifiers[{i}] is a {type(classifier).__name__}: only Classifiers have weights to average; mix "
                "the probabilities of others by OutputEnsemble"
            )
        if classifier.classes != classifiers[0].classes:
            raise ValueError(f"classifiers[{i}] has other classes, or another order of them, than classifiers[0]")


def _score(classifier: Classifier, validation: Any) -> tuple[float, float]:
    outputs = classifier.predict(validation)
    return accuracy_and_nll(outputs.logits, outputs.labels)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.to(tensors[0]) for t in tensors]).mean(0)
