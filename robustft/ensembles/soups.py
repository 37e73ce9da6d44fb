"""One classifier from several fine-tunings of one model: soups, and Model Stock.

theta = mean of theta_m                  all weights, the head s w with its scale inside, bias and scale
uniform: over all;   greedy: the best on held-out ID data first, then each next that does not make the mean worse
stock:   each layer between the zero-shot one and the mean, by the angles between the fine-tunings

Sources: Wortsman et al., ICML 2022, arXiv 2203.05482; Jang et al., Model Stock, ECCV 2024, arXiv 2403.19522.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from robustft import clip
from robustft.ops.kinds import described
from robustft.predictors.base import Classifier
from robustft.predictors.logits import accuracy_and_nll, preference


class GreedySoup(NamedTuple):
    """A soup, which classifiers went into it (indices, best first), and each one's own validation accuracy."""

    classifier: Classifier
    ingredients: tuple[int, ...]
    accuracies: tuple[float, ...]


def uniform_soup(classifiers: Sequence[Classifier]) -> Classifier:
    """The mean of classifiers of one architecture over the same classes, with its own copy of the model.

    Runs of one method, or of several from the same pre-trained model; the mean of models with different beginnings
    is useless. An absent bias counts as 0. Integer buffers are the first's. Means are taken in at least float32;
    what is equal in all stays as it is. Adapters are merged into the weights first. Memory: one more model.

    ValueError for no classifiers, other classes, weights that do not match, naming them, and models that compute
    different things with theirs (`clip.check_same_computation`).

    Source: Wortsman et al., model soups (ICML 2022, arXiv 2203.05482), section 2.
    """
    _check_listed(classifiers)
    if not classifiers:
        raise ValueError("classifiers is empty: a soup needs at least one")
    _check_alike(classifiers)
    return _made(classifiers, clip.average_states)


def model_stock(zero_shot: Classifier, classifiers: Sequence[Classifier]) -> Classifier:
    """Model Stock of a zero-shot classifier and two or more fine-tunings of it, with its own copy of the model.

    Every weight, and the head s w as one more, lies between the zero-shot one and the mean of the fine-tunings, the
    nearer to the mean the smaller the angles between their updates (`clip.stock_state`). There is nothing to choose,
    and two runs of one method with two seeds are enough. An absent bias counts as 0. Memory: one more model.

    Errors as of `uniform_soup`; ValueError for fewer than two classifiers.

    Source: Jang et al., Model Stock (ECCV 2024, arXiv 2403.19522), equation 8.
    """
    _check_listed(classifiers)
    if len(classifiers) < 2:
        raise ValueError(f"classifiers: expected at least two fine-tunings, got {len(classifiers)}")
    _check_alike([zero_shot, *classifiers])
    members = [zero_shot, *classifiers]

    def stock(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        first, *others = states
        return clip.stock_state(first, others)

    return _made(members, stock)


def _head_of(classifier: Classifier) -> dict[str, Tensor]:
    """What a classifier has beside its model, to be averaged like weights."""
    head = classifier.logit_scale * classifier.class_embeddings
    bias = head.new_zeros(len(head)) if classifier.bias is None else classifier.bias
    return {"scale": classifier.logit_scale, "head": head, "bias": bias}


Mean = Callable[[Iterable[Mapping[str, Tensor]]], dict[str, Tensor]]


def _made(members: Sequence[Classifier], mean: Mean) -> Classifier:
    """The classifier whose weights and head are the mean, of some kind, of those of the members."""
    first, like = members[0], _head_of(members[0])
    head = mean({name: value.to(like[name]) for name, value in _head_of(c).items()} for c in members)
    model = copy.deepcopy(clip.merged(first.model))
    model.load_state_dict(mean(clip.merged(c.model).state_dict() for c in members))
    for i, classifier in enumerate(members):
        clip.check_same_computation(model, clip.merged(classifier.model), "classifiers[0]", f"classifiers[{i}]")
    bias = head["bias"] if any(c.bias is not None for c in members) else None
    return Classifier(model, head["head"] / head["scale"], first.classes, logit_scale=head["scale"], bias=bias)


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
    best_first = sorted(range(len(scores)), key=lambda i: preference(*scores[i]))
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
