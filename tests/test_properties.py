"""Properties that hold for whatever arguments there are, tried on those that hypothesis finds.

The same examples each time: few in the plain run, many in the exhaustive one.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import exhaustive

import robustft
from robustft import functional
from robustft.calibration.measures import calibration_report, fit_temperature
from robustft.detection.metrics import ood_metrics, threshold
from robustft.neighbors import NeighborIndex

thoroughly = pytest.mark.parametrize("examples", [8, *exhaustive(200)])


def tried(property_of, examples, *strategies):
    """The property on so many examples, the same each time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)
    run(given(*strategies)(property_of))()


seeds = st.integers(0, 2**31 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def predictions(draw):
    """Probabilities (N, K), some of them equal, with labels."""
    n, k, g = draw(st.integers(1, 40)), draw(st.integers(2, 6)), generator(draw(seeds))
    logits = draw(st.sampled_from([0.0, 1.0, 5.0, 50.0])) * torch.randn(n, k, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        logits = logits.round()
    return logits, torch.randint(0, k, (n,), generator=g)


def plain_ece(p, labels, bins):
    """ECE and MCE by a loop over right-closed bins, in Python's numbers."""
    rows = [(max(row), row.index(max(row)) == label) for row, label in zip(p.tolist(), labels.tolist(), strict=True)]
    gaps = []
    for b in range(bins):
        inside = [row for row in rows if b / bins < row[0] <= (b + 1) / bins]
        if inside:
            gaps.append((len(inside), abs(sum(c for c, _ in inside) - sum(right for _, right in inside))))
    return sum(gap for _, gap in gaps) / len(rows), max(gap / count for count, gap in gaps)


@thoroughly
def test_calibration_measures_equal_a_plain_loop_lie_in_bounds_and_know_no_order(examples):
    def holds(data, bins, seed):
        logits, labels = data
        p = logits.softmax(1)
        report = calibration_report(p, labels, bins)
        ece, mce = plain_ece(p, labels, bins)
        assert math.isclose(report.ece, ece, rel_tol=0, abs_tol=1e-12)
        assert math.isclose(report.mce, mce, rel_tol=0, abs_tol=1e-12)
        brier = (p - torch.nn.functional.one_hot(labels, p.shape[1])).square().sum(1).mean()
        assert math.isclose(report.brier, float(brier), rel_tol=1e-12, abs_tol=1e-15)
        assert 0 <= report.ece <= report.mce <= 1 and 0 <= report.ace <= 1 and 0 <= report.classwise_ece <= 1
        order = torch.randperm(len(p), generator=generator(seed))
        again = calibration_report(p[order], labels[order], bins)
        for name in ("accuracy", "ece", "mce", "ace", "classwise_ece", "brier", "nll"):
            assert math.isclose(getattr(again, name), getattr(report, name), rel_tol=1e-9, abs_tol=1e-12), name

    tried(holds, examples, predictions(), st.integers(1, 20), seeds)


@thoroughly
def test_a_fitted_temperature_keeps_every_prediction_and_its_nll_is_no_worse_nearby(examples):
    def holds(data):
        logits, labels = data
        right = logits.argmax(1) == labels
        if logits.unique().numel() < 2 or bool(right.all()) or not bool(right.any()):
            return
        t = fit_temperature(logits, labels)
        assert t > 0
        top = logits.max(1).values
        assert torch.equal((logits / t).gather(1, logits.argmax(1, keepdim=True))[:, 0], top / t)

        def nll(temperature):
            return float(torch.nn.functional.cross_entropy(logits / temperature, labels))

        if 0.02 < t < 50:
            assert nll(t) <= min(nll(t * 1.01), nll(t / 1.01)) + 1e-9

    tried(holds, examples, predictions())


@st.composite
def pairs(draw):
    """Features (N, D) of both kinds, labels that repeat or none, weights or none, and the options of the loss."""
    n, d, g = draw(st.integers(1, 20)), draw(st.integers(1, 24)), generator(draw(seeds))
    x, t = (torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for _ in "xt")
    labels = torch.randint(0, draw(st.integers(1, 5)), (n,), generator=g)
    options = {
        "labels": draw(st.sampled_from([None, labels])),
        "weight": draw(st.sampled_from([None, torch.rand(n, generator=g, dtype=torch.float64)])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "memory": draw(st.sampled_from([0, "auto"])),
    }
    return x, t, draw(st.sampled_from([0.0, 1e-3, 100.0]) | st.floats(0.01, 100)), options


def assert_fused_equals_reference(loss, *leaves):
    """Values and gradients, in float64."""
    found = []
    for backend in ("auto", "reference"):
        fresh = [leaf.clone().requires_grad_() for leaf in leaves]
        with robustft.backend(backend):
            results = loss(*fresh)
            results = results if isinstance(results, tuple) else (results,)
            sum(((i + 1) * result).sum() for i, result in enumerate(results)).backward()
        found.append([*(result.detach() for result in results), *(leaf.grad for leaf in fresh)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@thoroughly
def test_the_fused_contrastive_losses_equal_the_reference(examples):
    def holds(data, label_smoothing):
        x, t, scale, options = data
        s = torch.tensor(scale, dtype=torch.float64)
        smooth = {**options, "label_smoothing": label_smoothing}
        assert_fused_equals_reference(lambda x, t, s: functional.contrastive_loss(x, t, s, **smooth), x, t, s)
        teacher = (x.flip(0), t.flip(0), 10.0)
        assert_fused_equals_reference(
            lambda x, t, s: functional.contrastive_distillation_loss(x, t, s, *teacher, **options), x, t, s
        )

    tried(holds, examples, pairs(), st.sampled_from([0.0, 0.1, 0.9]))


@thoroughly
def test_the_fused_sigmoid_losses_equal_the_reference(examples):
    def holds(data, bias):
        x, t, scale, options = data
        s, b = (torch.tensor(number, dtype=torch.float64) for number in (scale, bias))
        assert_fused_equals_reference(
            lambda x, t, s, b: functional.sigmoid_contrastive_loss(x, t, s, b, **options), x, t, s, b
        )
        teacher = (x.flip(0), t.flip(0), 10.0, -3.0)
        assert_fused_equals_reference(
            lambda x, t, s, b: functional.sigmoid_contrastive_distillation_loss(x, t, s, b, *teacher, **options),
            *(x, t, s, b),
        )

    tried(holds, examples, pairs(), st.sampled_from([0.0, -10.0, 100.0]) | st.floats(-30, 30))


@thoroughly
def test_the_fused_class_losses_equal_the_reference(examples):
    def holds(data, k, label_smoothing, variant, top1, seed):
        x, _, scale, options = data
        g = generator(seed)
        w = torch.nn.functional.normalize(torch.randn(k, x.shape[1], generator=g, dtype=torch.float64), dim=1)
        y, q = torch.randint(0, k, (len(x),), generator=g), torch.rand(len(x), k, generator=g, dtype=torch.float64)
        s = torch.tensor(scale, dtype=torch.float64)
        shared = {name: value for name, value in options.items() if name != "labels"}
        named = {**shared, "label_smoothing": label_smoothing, "variant": variant, "top1": top1}
        assert_fused_equals_reference(lambda x, w, s: functional.classification_loss(x, w, y, s, **named), x, w, s)
        assert_fused_equals_reference(lambda x, w, s: functional.dual_risk(x, w, w.flip(1), y, q, s, **shared), x, w, s)

    variants = st.sampled_from(["neg_log_ratio", "neg_ratio", "softplus", "ratio"])
    options = (st.integers(1, 12), st.sampled_from([0.0, 0.1]), variants, st.booleans(), seeds)
    tried(holds, examples, pairs(), *options)


@thoroughly
def test_neighbours_equal_a_sorted_table_of_distances_ties_by_the_lower_index(examples):
    def holds(n, q, d, seed, coarse, data):
        g = generator(seed)
        points, queries = torch.randn(n, d, generator=g), torch.randn(q, d, generator=g)
        if coarse:  # whole numbers: many points at exactly equal distances
            points, queries = points.round(), queries.round()
        k = data.draw(st.integers(1, n))
        table = (queries[:, None].double() - points[None].double()).square().sum(2).float()
        distances, indices = table.sort(dim=1, stable=True)
        index = NeighborIndex(points)
        found = index.nearest(queries, k)
        torch.testing.assert_close(found.distances, distances[:, :k], rtol=1e-6, atol=0)
        assert torch.equal(found.indices, indices[:, :k])
        assert torch.equal(index.kth_distance(queries, k), found.distances[:, -1])

    sizes = st.integers(1, 40), st.integers(1, 8), st.integers(1, 9)
    tried(holds, examples, *sizes, seeds, st.booleans(), st.data())


@thoroughly
def test_auroc_is_the_share_of_pairs_in_order_and_the_threshold_keeps_its_share(examples):
    scores = st.lists(st.integers(-5, 5).map(float) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=25)

    def holds(known, unknown, tpr):
        a, b = torch.tensor(known, dtype=torch.float64), torch.tensor(unknown, dtype=torch.float64)
        found = ood_metrics(a, b, tpr)
        higher = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
        assert math.isclose(found.auroc, float(higher.mean()), abs_tol=1e-12)
        limit = threshold(a, tpr)
        assert float((a >= limit).double().mean()) >= tpr
        assert found.fpr == float((b >= limit).double().mean())
        above = a[a > limit]
        assert len(above) / len(a) < tpr, "a higher threshold would keep the share too"

    tried(holds, examples, scores, scores, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
