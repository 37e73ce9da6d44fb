"""Selective risk against the mean over all orders of equal confidences, and against the closed form of AUGRC."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from robustft.detection.metrics import ood_metrics
from robustft.evaluation import selective_risk


def over_all_orders(confidence, correct):
    """(AURC, AUGRC) as fractions, the mean over every order that falls in confidence."""
    n = len(confidence)
    orders = [o for o in itertools.permutations(range(n)) if (np.diff(confidence[list(o)]) <= 0).all()]
    aurc = augrc = Fraction(0)
    for order in orders:
        errors, before = Fraction(0), Fraction(0)
        for i, row in enumerate(order, 1):
            errors += not correct[row]
            aurc += errors / i / n
            augrc += (before + errors) / 2 / n / n
            before = errors
    return float(aurc / len(orders)), float(augrc / len(orders))


@pytest.mark.parametrize("seed", range(6))
def test_areas_are_the_mean_over_all_orders_of_equal_confidences(seed):
    generator = np.random.default_rng(seed)
    confidence, correct = generator.integers(0, 4, 6) / 4.0, generator.random(6) < 0.6
    found = selective_risk(confidence, correct)
    assert (found.aurc, found.augrc) == pytest.approx(over_all_orders(confidence, correct), abs=1e-12)
    best = over_all_orders(np.argsort(np.argsort(correct.astype(float), kind="stable")) / 6, correct)[0]
    assert found.e_aurc == pytest.approx(found.aurc - best, abs=1e-12)


def test_augrc_has_the_closed_form_of_its_paper():
    g = torch.Generator().manual_seed(0)
    confidence = (torch.rand(500, generator=g) * 40).round() / 40
    correct = torch.rand(500, generator=g) < confidence
    found, a = selective_risk(confidence, correct), float(correct.double().mean())
    auroc = ood_metrics(confidence[correct], confidence[~correct]).auroc
    assert found.augrc == pytest.approx((1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2, abs=1e-12)
    assert found.error == pytest.approx(1 - a)


def test_the_curve_by_hand_and_its_operating_points():
    found = selective_risk(np.array([0.9, 0.5, 0.5, 0.7, 0.1]), torch.tensor([True, False, True, True, False]))
    assert found.coverage == (0.2, 0.4, 0.8, 1.0) and found.threshold == (0.9, 0.7, 0.5, 0.1)
    assert found.risk == (0.0, 0.0, 0.25, 0.4)
    assert found.at_risk(0.3) == (0.5, 0.8, 0.25) and found.at_risk(0.0) == (0.7, 0.4, 0.0)
    # No half of a group is answered: the bound between its ends is that of the group before.
    assert found.at_risk(0.2).coverage == 0.4
    assert selective_risk(torch.tensor([0.5]), torch.tensor([False])).at_risk(0.5) == (float("inf"), 0.0, 0.0)


def test_risk_that_rises_and_falls_again_gives_the_largest_coverage():
    found = selective_risk(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([False, True, True, True]))
    assert found.at_risk(0.25) == (1.0, 1.0, 0.25)


def test_neither_order_nor_an_increasing_function_changes_a_number():
    g = torch.Generator().manual_seed(1)
    confidence = (torch.rand(300, generator=g) * 20).round()
    correct = torch.rand(300, generator=g) < 0.7
    one, order = selective_risk(confidence, correct), torch.randperm(300, generator=g)
    two = selective_risk((confidence[order] / 7).exp(), correct[order])
    assert [getattr(two, k) for k in ("aurc", "augrc", "coverage", "risk")] == [
        getattr(one, k) for k in ("aurc", "augrc", "coverage", "risk")
    ]


def test_a_thinned_curve_keeps_measures_points_and_the_end():
    g = torch.Generator().manual_seed(2)
    found = selective_risk(torch.rand(5000, generator=g), torch.rand(5000, generator=g) < 0.8)
    thin = found.thinned(50)
    assert len(thin.coverage) == 50 and thin.aurc == found.aurc and thin.coverage[-1] == 1.0
    assert set(zip(thin.coverage, thin.risk, strict=True)) <= set(zip(found.coverage, found.risk, strict=True))
    assert thin.coverage[24] == 0.5 and thin.thinned(50) is thin


@pytest.mark.parametrize(
    ("confidence", "correct", "error", "message"),
    [
        ([], [], ValueError, "N >= 1 images"),
        ([0.1, 0.2], [True], ValueError, r"got \(2,\) and \(1,\)"),
        ([float("nan")], [True], ValueError, "holds 1 NaN of 1"),
        ([0.1], [1], TypeError, "correct must be bool"),
    ],
)
def test_misuse_is_refused(confidence, correct, error, message):
    with pytest.raises(error, match=message):
        selective_risk(torch.tensor(confidence), torch.tensor(correct, dtype=None if correct else torch.bool))
