"""The measures of WILDS, against scikit-learn and by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from robustft.evaluation.groups import group_accuracy, macro_f1, worst_group_accuracy


def samples(seed, n=60, k=8):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    predictions = torch.where(torch.rand(n, generator=generator) < 0.6, labels, torch.randint(0, k, (n,)))
    return predictions, labels, torch.randint(0, 5, (n,), generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns_over_the_classes_of_the_labels(seed):
    predictions, labels, _ = samples(seed)
    labels = torch.where(labels == seed, (labels + 1) % 8, labels)  # a class that is predicted but never there
    present = labels.unique()
    assert seed not in present
    expected = f1_score(labels, predictions, average="macro", labels=present)
    assert macro_f1(predictions, labels) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_by_hand():
    # class 0: TP 1, FN 1, FP 1: 1/2; class 1: never right: 0; class 2, predicted once, is not there: left out
    assert macro_f1(torch.tensor([0, 2, 0]), torch.tensor([0, 0, 1])) == 0.25


def test_the_largest_score_is_the_prediction():
    predictions, labels, groups = samples(0)
    scores = torch.nn.functional.one_hot(predictions, 8).double() - 0.3
    assert macro_f1(scores, labels) == macro_f1(predictions, labels)
    assert worst_group_accuracy(scores, labels, groups) == worst_group_accuracy(predictions, labels, groups)


def test_group_accuracies_are_scikit_learns_and_an_empty_group_is_never_the_worst():
    predictions, labels, groups = samples(1)
    groups = torch.where(groups == 3, 4, groups)
    table = group_accuracy(predictions, labels, groups, num_groups=7)
    for group in (0, 1, 2, 4):
        own = groups == group
        assert table.counts[group] == own.sum()
        assert float(table.accuracy[group]) == pytest.approx(accuracy_score(labels[own], predictions[own]), abs=1e-12)
    assert table.accuracy[[3, 5, 6]].tolist() == [0.0] * 3 and table.counts[[3, 5, 6]].tolist() == [0] * 3
    assert table.worst == table.accuracy[[0, 1, 2, 4]].min() > 0
    assert worst_group_accuracy(predictions, labels, groups) == table.worst
    worst = int((table.accuracy + (table.counts == 0)).argmin())
    left = [group for group in (0, 1, 2, 4) if group != worst]
    assert worst_group_accuracy(predictions, labels, groups, ignored=[worst]) == table.accuracy[left].min()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"predictions": torch.zeros(3)}, "predictions must be integers"),
        ({"predictions": torch.tensor([0, 1, -1])}, "predictions must not be negative, got -1"),
        ({"predictions": torch.tensor([[0.0, torch.nan]] * 3)}, "3 rows with NaN"),
        ({"labels": torch.tensor([0, 1])}, r"labels must be integers \(N,\).* for 3 samples"),
        ({"groups": torch.tensor([0, 1, 2])}, r"groups must lie in \[0, 2\), got 2"),
        ({"groups": torch.tensor([0, 0, 0]), "ignored": [0]}, "no worst one"),
        ({"ignored": [2]}, r"ignored must hold groups in \[0, 2\), got \[2\]"),
    ],
)
def test_what_is_no_prediction_is_refused_by_name(changes, message):
    arguments = {
        "predictions": torch.tensor([0, 1, 1]),
        "labels": torch.tensor([0, 1, 0]),
        "groups": torch.tensor([0, 1, 1]),
        "num_groups": 2,
    }
    with pytest.raises(ValueError, match=message):
        group_accuracy(**(arguments | changes))
