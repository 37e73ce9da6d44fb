from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from robustft.calibration.measures import (
    CONFIDENCE_TOLERANCE,
    TEMPERATURES,
    calibration_report,
    fit_temperature,
    temperature_matching_confidence,
)


def softmax_data(n: int = 600, k: int = 7, scale: float = 2.0, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, k, generator=g, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(1)
    return logits, labels


def binary(confidence, correct):
    """Two-class probabilities with the given top confidences (> 1/2), and labels that are right where
    `correct`."""
    c = np.asarray(confidence, dtype=np.float64)
    return np.stack([c, 1 - c], 1), np.where(np.asarray(correct, dtype=bool), 0, 1)


def plain_ece(confidence, correct, bins):
    """Bin by bin with explicit comparisons, the definition read aloud."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if b == 0:
            inside |= confidence == 0
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


# Reports


def test_report_equals_definitions():
    logits, labels = softmax_data()
    p = (1.7 * logits).softmax(-1)
    r = calibration_report(p, labels)
    q, y = p.numpy(), labels.numpy()
    confidence, correct = q.max(1), q.argmax(1) == y
    onehot = np.eye(7)[y]
    assert r.count == 600 and r.accuracy == correct.mean()
    assert r.confidence == pytest.approx(confidence.mean(), rel=1e-12)
    assert r.ece == pytest.approx(plain_ece(confidence, correct, 15), rel=1e-12)
    assert r.brier == pytest.approx(((q - onehot) ** 2).sum(1).mean(), rel=1e-12)
    assert r.nll == pytest.approx(-np.log(q[np.arange(600), y]).mean(), rel=1e-12)
    assert r.classwise_ece == pytest.approx(
        np.mean([plain_ece(q[:, c], onehot[:, c], 15) for c in range(7)]), rel=1e-12
    )
    gaps = [abs(b.accuracy - b.confidence) for b in r.bins]
    assert r.mce == max(gaps)
    assert r.mass_weighted_mce == pytest.approx(max(b.count / 600 * g for b, g in zip(r.bins, gaps, strict=True)))
    assert r.mass_weighted_mce <= r.ece <= r.mce
    assert sum(b.count for b in r.bins) == 600


@pytest.mark.exhaustive  # importing torchmetrics takes seconds; the plain run has the definitions
def test_report_equals_torchmetrics_without_confidence_one():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = softmax_data(scale=1.0)
    p = logits.softmax(-1).float()
    r = calibration_report(p, labels, bins=10)
    for norm, value in (("l1", r.ece), ("max", r.mce)):
        theirs = torchmetrics.multiclass_calibration_error(p, labels, num_classes=7, n_bins=10, norm=norm)
        assert value == pytest.approx(float(theirs), abs=1e-6)


def certain():
    """The last bin holds .98 (all right) and 1.0 (half right): together its gap is smaller than the two apart."""
    return binary([0.98] * 10 + [1.0] * 10, [1] * 10 + [1, 0] * 5)


def test_confidence_one_is_in_the_last_bin():
    r = calibration_report(*certain(), bins=10)
    assert [b.count for b in r.bins] == [20] and r.bins[0].upper == 1.0
    assert r.ece == pytest.approx(0.99 - 0.75, rel=1e-12)


@pytest.mark.exhaustive
def test_confidence_one_is_in_a_bin_of_its_own_in_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    p, y = certain()
    theirs = torchmetrics.multiclass_calibration_error(
        torch.tensor(p), torch.tensor(y), num_classes=2, n_bins=10, norm="l1"
    )
    assert float(theirs) == pytest.approx((10 * 0.02 + 10 * 0.5) / 20, abs=1e-6)


def test_bins_are_right_closed():
    p, y = binary([0.75, 0.5, 0.5 + 1e-12], [1, 1, 1])
    assert [(b.lower, b.upper, b.count) for b in calibration_report(p, y, bins=4).bins] == [
        (0.25, 0.5, 1),
        (0.5, 0.75, 2),
    ]


def test_extremes_are_exact():
    right, wrong = binary([1.0] * 8, [1] * 8), binary([1.0] * 8, [0] * 8)
    r = calibration_report(*right)
    assert (r.ece, r.mce, r.ace, r.classwise_ece, r.brier, r.nll) == (0,) * 6
    assert abs(r.noise_floor) < 1e-15
    r = calibration_report(*wrong)
    assert (r.ece, r.mce, r.ace, r.classwise_ece, r.brier) == (1, 1, 1, 1, 2)
    assert r.nll == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
    logits, labels = softmax_data()
    r = calibration_report(logits.softmax(-1), labels, bins=1)
    assert r.ece == pytest.approx(abs(r.accuracy - r.confidence), rel=1e-12) and r.ece == r.ace == r.mce


def test_equal_confidences_share_an_equal_mass_bin_in_any_order():
    confidence = np.repeat([0.6, 0.7, 0.8, 0.9], [5, 40, 5, 10])
    correct = np.arange(60) % 3 > 0
    p, y = binary(confidence, correct)
    r = calibration_report(p, y, bins=6, scheme="mass")
    assert [b.count for b in r.bins] == [
        45,
        5,
        10,
    ] and r.ece == r.ace  # 0, 5, 45, 50 lower ranks -> bins 0, 0, 4, 5
    order = np.random.default_rng(0).permutation(60)
    shuffled = calibration_report(p[order], y[order], bins=6, scheme="mass")
    assert shuffled.ece == pytest.approx(r.ece, rel=1e-12)
    assert [b.upper for b in r.bins] == pytest.approx([0.7, 0.8, 0.9])


def test_equal_mass_bins_without_ties_hold_equal_counts():
    logits, labels = softmax_data(n=150)
    r = calibration_report(logits.softmax(-1), labels, bins=15, scheme="mass")
    assert [b.count for b in r.bins] == [10] * 15
    assert all(a.upper == b.lower for a, b in zip(r.bins, r.bins[1:], strict=False))


def test_every_measure_is_permutation_invariant():
    logits, labels = softmax_data()
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(-1)
    a, b = calibration_report(p, labels), calibration_report(p[order], labels[order])
    for name in ("accuracy", "ece", "mce", "ace", "classwise_ece", "brier", "nll", "noise_floor"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9), name


def test_report_is_independent_of_the_rows_held_at_a_time(monkeypatch):
    logits, labels = softmax_data()
    whole = calibration_report(logits.softmax(-1), labels)
    monkeypatch.setattr("robustft.calibration.measures._ROWS", 37)
    chunked = calibration_report(logits.softmax(-1), labels)
    for name in ("accuracy", "ece", "classwise_ece", "brier", "nll", "noise_floor"):
        assert getattr(whole, name) == pytest.approx(getattr(chunked, name), rel=1e-12), name


def test_per_batch_protocol_is_the_weighted_mean_of_batches_and_flatters_nobody():
    logits, labels = softmax_data(n=20_000, k=5, scale=3.0)
    p = logits.softmax(-1)
    order = labels.argsort(stable=True)  # class-sorted, as image folders come
    whole = calibration_report(p, labels, bins=10)
    batched = calibration_report(p[order], labels[order], bins=10, protocol="per_batch", batch_size=512)
    parts = [
        calibration_report(p[order][i : i + 512], labels[order][i : i + 512], bins=10) for i in range(0, 20_000, 512)
    ]
    assert batched.ece == pytest.approx(sum(r.ece * r.count for r in parts) / 20_000, rel=1e-12)
    assert batched.nll == pytest.approx(whole.nll, rel=1e-12) and batched.accuracy == whole.accuracy
    assert whole.ece < 0.01 and batched.ece > 0.025  # the model is perfectly calibrated


@pytest.mark.parametrize(
    ("n", "percent"), [(300, (4.72, 5.75, 6.62)), (1000, (2.60, 3.11, 3.58)), (50_000, (0.37, 0.46, 0.52))]
)
def test_noise_floor_reproduces_the_published_table(n, percent):
    # Confidences ~ Beta(4, 1.2), labels ~ Bernoulli(confidence): 10, 15 and 15 equal-mass bins. The table is
    # a short simulation, right to a few per cent.
    c = np.random.default_rng(3).beta(4, 1.2, (n, 1))
    wide = np.concatenate([c, np.repeat((1 - c) / 99, 99, 1)], 1)
    y = np.zeros(n, dtype=int)
    found = (
        calibration_report(wide, y, bins=10).noise_floor,
        calibration_report(wide, y, bins=15).noise_floor,
        calibration_report(wide, y, bins=15, scheme="mass").noise_floor,
    )
    assert 100 * np.array(found) == pytest.approx(percent, rel=0.05)


@pytest.mark.parametrize("case", ["one sample", "nearly certain", "wide", "many"])
def test_noise_floor_is_the_mean_ece_of_a_perfectly_calibrated_model(case):
    rng = np.random.default_rng(5)
    confidence = {
        "one sample": np.array([0.9]),
        "nearly certain": rng.uniform(0.995, 1.0, 400),
        "wide": rng.uniform(0.5, 1.0, 200),
        "many": rng.uniform(0.5, 1.0, 6000),
    }[case]
    p, y = binary(confidence, np.ones(len(confidence)))
    floor = calibration_report(p, y, bins=10).noise_floor
    runs = 4000 if len(confidence) < 1000 else 400
    index = np.ceil(confidence * 10).astype(int) - 1
    simulated = [
        np.abs(np.bincount(index, confidence - (rng.random(len(confidence)) < confidence))).sum() / len(confidence)
        for _ in range(runs)
    ]
    assert floor == pytest.approx(np.mean(simulated), abs=4 * np.std(simulated) / math.sqrt(runs))


def test_noise_floor_of_identical_bernoullis_is_exact():
    # E|S - n c| of a binomial, by its probability mass function.
    for n, c in ((1, 0.75), (30, 0.9), (200, 0.99), (350, 0.5)):
        pmf = np.exp([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
                      + k * math.log(c) + (n - k) * math.log1p(-c) for k in range(n + 1)])  # fmt: skip
        p, y = binary([c] * n, [1] * n)
        assert calibration_report(p, y).noise_floor == pytest.approx(
            np.abs(np.arange(n + 1) - n * c) @ pmf / n, rel=1e-10
        )


def test_a_perfectly_calibrated_model_scores_at_its_noise_floor():
    logits, labels = softmax_data(n=40_000, k=4)
    r = calibration_report(logits.softmax(-1), labels)
    assert 0.3 * r.noise_floor < r.ece < 2.5 * r.noise_floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_probabilities_are_measured_as_they_are(dtype):
    logits, labels = softmax_data()
    p = logits.softmax(-1).to(dtype)
    assert calibration_report(p, labels).ece == pytest.approx(
        calibration_report(logits.softmax(-1), labels).ece, abs=0.02
    )


@pytest.mark.parametrize(
    ("p", "y", "match"),
    [
        (torch.randn(4, 3) * 5, torch.zeros(4, dtype=torch.long), "softmax first"),
        (torch.rand(4, 3) * 0.3 + 0.5, torch.zeros(4, dtype=torch.long), "sums to .*cosines.*softmax first"),
        (torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long), "4 of 4 rows hold NaN"),
        (torch.full((4, 3), 1 / 3), torch.tensor([0, 1, 2, 3]), r"labels must lie in \[0, 2\]"),
        (torch.full((4, 3), 1 / 3), torch.tensor([0, 1, 2, -1]), r"labels must lie in \[0, 2\]"),
        (torch.full((4, 3), 1 / 3), torch.zeros(3, dtype=torch.long), r"labels must have shape \(4,\)"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "non-empty"),
        (torch.full((4,), 0.5), torch.zeros(4, dtype=torch.long), r"\(N, K\)"),
    ],
)  # fmt: skip
def test_what_is_no_distribution_is_refused(p, y, match):
    with pytest.raises(ValueError, match=match):
        calibration_report(p, y)


def test_wrong_types_and_options_are_refused():
    p, y = torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.long)
    with pytest.raises(TypeError, match="labels must be integers"):
        calibration_report(p, y.float())
    with pytest.raises(TypeError, match="floating point"):
        calibration_report(p.long(), y)
    for kwargs in ({"bins": 0}, {"scheme": "equal"}, {"protocol": "batch"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            calibration_report(p, y, **kwargs)


# Temperature


@pytest.mark.parametrize("planted", [0.01, 0.4, 1.0, 6.0, 100.0])
def test_fitted_temperature_recovers_a_planted_one(planted):
    logits, labels = softmax_data(n=40_000, k=5, scale=1.5)
    assert fit_temperature(planted * logits, labels) == pytest.approx(planted, rel=0.03)


def test_fitted_temperature_is_the_minimum_of_nll_and_scales_with_the_logits():
    logits, labels = softmax_data(scale=3.0, n=300)
    t = fit_temperature(logits * 2, labels)

    def nll(temperature):
        return float(torch.nn.functional.cross_entropy(logits * 2 / temperature, labels))

    assert nll(t) <= min(nll(t * (1 + s * d)) for s in (-1, 1) for d in (1e-3, 1e-2, 0.3))
    beta = torch.tensor(1 / t, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(beta * logits * 2, labels).backward()
    assert abs(float(beta.grad)) < 1e-9
    assert fit_temperature(logits * 20, labels) == pytest.approx(10 * t, rel=1e-8)


def test_temperatures_of_undecided_data_are_the_ends_of_the_range_and_say_so():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    with pytest.warns(RuntimeWarning, match="NLL has no minimum.*returning 0.001.*hold out more, or match confidence"):
        assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(TEMPERATURES[0])
    with pytest.warns(RuntimeWarning, match="returning 1000.*labels and classes are in one order"):
        assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(TEMPERATURES[1])
    with pytest.warns(RuntimeWarning, match="cannot meet accuracy.*returning 1000"):
        assert temperature_matching_confidence(logits, torch.tensor([1, 0])) == pytest.approx(TEMPERATURES[1])


def test_temperature_is_one_where_it_changes_nothing():
    labels = torch.zeros(5, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for logits in (torch.randn(5, 1), torch.ones(5, 4)):
            assert fit_temperature(logits, labels) == temperature_matching_confidence(logits, labels) == 1.0
    # One class among the labels, but not one logit: an ordinary fit.
    assert 0.1 < fit_temperature(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]]), torch.zeros(4, dtype=torch.long)) < 10


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_matching_temperature_brings_confidence_to_accuracy(scale):
    logits, labels = softmax_data(n=2000)
    t = temperature_matching_confidence(scale * logits, labels)
    r = calibration_report((scale * logits / t).softmax(-1), labels)
    assert abs(r.confidence - r.accuracy) <= CONFIDENCE_TOLERANCE


def test_matching_temperature_of_a_faultless_model_stays_away_from_zero():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = temperature_matching_confidence(logits, torch.tensor([0, 1]))
    assert float((logits / t).softmax(-1).amax(1).mean()) == pytest.approx(1 - CONFIDENCE_TOLERANCE, abs=1e-9)


def test_temperature_survives_logits_of_any_size():
    logits, labels = softmax_data(n=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_temperature(logits * 300, labels) == pytest.approx(300 * fit_temperature(logits, labels), rel=1e-8)
    with pytest.raises(ValueError, match="must be finite"):
        fit_temperature(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))


def test_a_search_is_a_few_passes(monkeypatch):
    import robustft.calibration.measures as calibration

    passes = []
    inner = calibration._temperature_sums
    monkeypatch.setattr(calibration, "_temperature_sums", lambda *a: passes.append(1) or inner(*a))
    logits, labels = softmax_data(n=500)
    fit_temperature(logits, labels)
    assert len(passes) < 40
