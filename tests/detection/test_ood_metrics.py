from __future__ import annotations

import numpy as np
import pytest
import torch

from robustft.detection import (
    OODMetrics,
    energy,
    entropy,
    max_cosine,
    mcm,
    msp,
    ood_metrics,
    spectrum_metrics,
    threshold,
)


def scores(kind: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(1, 1, 500), rng.normal(0, 1.3, 230)
    if kind == "tied":
        inside, outside = np.round(inside), np.round(outside)
    return inside, outside


@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_areas_equal_scikit_learn(kind):
    metrics = pytest.importorskip("sklearn.metrics")
    inside, outside = scores(kind)
    is_id = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    s = np.r_[inside, outside]
    m = ood_metrics(inside, outside)
    assert m.auroc == pytest.approx(metrics.roc_auc_score(is_id, s), rel=1e-12)
    assert m.aupr_in == pytest.approx(metrics.average_precision_score(is_id, s), rel=1e-12)
    assert m.aupr_out == pytest.approx(metrics.average_precision_score(1 - is_id, -s), rel=1e-12)


@pytest.mark.parametrize("kind", ["distinct", "tied"])
@pytest.mark.parametrize("positive", ["id", "ood"])
@pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
def test_fpr_is_read_off_the_first_threshold_that_reaches_the_tpr(kind, positive, tpr):
    inside, outside = scores(kind)
    m = ood_metrics(inside, outside, tpr=tpr, positive=positive)
    best = None
    for t in np.unique(np.r_[inside, outside])[:: -1 if positive == "id" else 1]:
        accepted = (inside >= t, outside >= t) if positive == "id" else (outside <= t, inside <= t)
        if accepted[0].mean() >= tpr:
            best = accepted[1].mean(), t, accepted[0].mean()
            break
    # Thresholds between the attained one and the next positive score are equivalent: ours is a positive's
    # score.
    assert (m.fpr, m.threshold, m.tpr) == best
    assert m.positive == positive


def test_the_orientation_changes_fpr_but_not_auroc():
    rng = np.random.default_rng(1)
    inside, outside = np.r_[rng.normal(0, 0.1, 900), rng.normal(-3, 1, 100)], rng.normal(-1, 0.3, 300)
    a, b = ood_metrics(inside, outside), ood_metrics(inside, outside, positive="ood")
    assert a.auroc == b.auroc and a.aupr_in == b.aupr_in
    assert a.fpr == 1.0 and b.fpr < 0.15
    swapped = ood_metrics(-outside, -inside)
    assert (swapped.auroc, swapped.fpr, -swapped.threshold) == (b.auroc, b.fpr, b.threshold)


def test_small_cases_are_exact():
    assert ood_metrics([2.0, 3.0], [0.0, 1.0]) == OODMetrics(1.0, 1.0, 1.0, 0.0, 2.0, 1.0, "id")
    assert ood_metrics([1.0] * 4, [1.0] * 2) == OODMetrics(0.5, 4 / 6, 2 / 6, 1.0, 1.0, 1.0, "id")
    assert ood_metrics([0.0], [1.0]).auroc == 0.0


def test_threshold_accepts_exactly_the_asked_share_of_distinct_scores():
    # tpr * N is inexact for many of these: 0.07 * 100 > 7 and 0.29 * 100 < 29 in floating point.
    for n in (20, 60, 100, 1000):
        s = np.random.default_rng(n).permutation(n).astype(float)
        for k in range(1, n + 1):
            assert np.sum(s >= threshold(s, k / n)) == k
    assert threshold(torch.arange(100.0), 0.07) == 93.0


def test_low_precision_scores_are_compared_as_they_are():
    s = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)
    assert ood_metrics(s, s).auroc == 0.5
    assert threshold(s, 1.0) == float(s[0])


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        ([], [1.0], "id_scores must be a non-empty"),
        ([1.0], [], "ood_scores must be a non-empty"),
        ([1.0, np.nan], [1.0], "id_scores must not hold NaN, but 1 of 2"),
        ([1.0], [[1.0]], "ood_scores must be .* one-dimensional"),
    ],
)
def test_missing_or_undefined_populations_are_refused(a, b, match):
    with pytest.raises(ValueError, match=match):
        ood_metrics(a, b)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="positive"):
        ood_metrics([1.0], [0.0], positive="OOD")
    for tpr in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="tpr"):
            threshold([1.0], tpr)


# Scores


def cosines(n=64, k=10, seed=0, dtype=torch.float32):
    x = torch.nn.functional.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)
    w = torch.nn.functional.normalize(torch.randn(k, 16, generator=torch.Generator().manual_seed(9)), dim=-1)
    return (x @ w.T).to(dtype)


@pytest.mark.parametrize("tau", [0.01, 0.3, 1.0])
def test_mcm_is_msp_at_scale_one_over_tau(tau):
    c = cosines(dtype=torch.float64)
    torch.testing.assert_close(mcm(c, tau), msp(c / tau), rtol=1e-13, atol=0)
    torch.testing.assert_close(mcm(c, tau), (c / tau).softmax(-1).amax(-1), rtol=1e-12, atol=0)


def test_scores_equal_their_formulas_and_rank_certainty_above_doubt():
    z = 5 * cosines(dtype=torch.float64)
    p = z.softmax(-1)
    torch.testing.assert_close(entropy(z), (p * p.log()).sum(-1))
    torch.testing.assert_close(energy(z, 0.5), 0.5 * (z / 0.5).exp().sum(-1).log())
    torch.testing.assert_close(max_cosine(cosines()), cosines().amax(-1))
    sure, unsure = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.1, 0.0]])
    for score in (mcm, max_cosine, msp, energy, entropy):
        assert score(sure) > score(unsure)


def test_mcm_of_a_thousand_classes_keeps_its_values_apart_whatever_the_input_precision():
    c = cosines(n=2000, k=1000, dtype=torch.bfloat16)
    s = mcm(c)
    assert s.dtype == torch.float32 and s.unique().numel() > 1500
    assert s.bfloat16().unique().numel() < 200


@pytest.mark.parametrize("score", [mcm, max_cosine])
@pytest.mark.parametrize("bad", [100.0 * cosines(), torch.tensor([[0.5, torch.nan]]), torch.tensor([[-1.1, 0.0]])])
def test_what_are_no_cosines_is_refused(score, bad):
    with pytest.raises(ValueError, match="look like scaled logits: pass cosines"):
        score(bad)


def test_half_precision_unit_vectors_are_still_cosines():
    x = torch.nn.functional.normalize(
        torch.randn(200, 64, generator=torch.Generator().manual_seed(0)), dim=-1
    ).bfloat16()
    assert mcm(x @ x.T).isfinite().all()


def test_scores_reject_integers_and_non_positive_temperatures():
    with pytest.raises(TypeError, match="floating point"):
        msp(torch.ones(2, 3, dtype=torch.long))
    for score in (mcm, energy, entropy):
        with pytest.raises(ValueError, match="temperature must be positive"):
            score(cosines(), 0.0)


def test_full_spectrum_counts_the_shifts_images_as_id_and_averages_over_ood_sets():
    rng = np.random.default_rng(5)
    known, shifted, other = rng.normal(2, 1, 60), rng.normal(1, 1, 50), rng.normal(1.2, 1, 9)
    near = {"a": rng.normal(0.5, 1, 40), "b": rng.normal(0, 1, 30)}
    far = {"c": torch.from_numpy(rng.normal(-1, 1, 20))}
    for positive in ("id", "ood"):
        found = spectrum_metrics(known, near=near, far=far, shifts={"s": shifted, "t": other}, positive=positive)
        everything = np.concatenate([known, shifted, other])
        for inside, groups in ((known, (found.near, found.far)), (everything, (found.full_near, found.full_far))):
            for sets, group in zip((near, far), groups, strict=True):
                expected = {name: ood_metrics(inside, scores, positive=positive) for name, scores in sets.items()}
                assert group.sets == expected
                assert group.auroc == pytest.approx(np.mean([m.auroc for m in expected.values()]))
                assert group.fpr == pytest.approx(np.mean([m.fpr for m in expected.values()]))
        assert found.full_near.auroc < found.near.auroc < found.far.auroc
    alone = spectrum_metrics(known, far=far)
    assert alone.far.sets == {"c": ood_metrics(known, far["c"])}
    assert alone.near is alone.full_near is alone.full_far is None
    with pytest.raises(ValueError, match="near and far are empty"):
        spectrum_metrics(known, shifts={"s": shifted})
    with pytest.raises(ValueError, match=r"near\['a'\] must not hold NaN"):
        spectrum_metrics(known, near={"a": np.array([np.nan])})
