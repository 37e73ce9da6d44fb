"""OOD scores against their formulas, restated in float64 with loops and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robustft import NeighborIndex
from robustft.detection.scores import (
    energy,
    fit_class_gaussians,
    gl_mcm,
    knn_distance,
    local_mcm,
    mahalanobis,
    mcm,
    msp,
    neg_label,
    select_negatives,
    variance,
)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def softmax(row):
    e = np.exp(np.asarray(row, np.float64) - max(row))
    return e / e.sum()


X, W, PATCHES = unit(7, 6), unit(5, 6, seed=1), unit(7, 4, 6, seed=2)
COSINES, PATCH_COSINES = X @ W.T, PATCHES @ W.T


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_local_scores_equal_loops_over_patches_and_classes(tau):
    local = [max(softmax(patch / tau).max() for patch in image.numpy()) for image in PATCH_COSINES]
    np.testing.assert_allclose(local_mcm(PATCH_COSINES, tau), local, rtol=1e-12)
    both = [softmax(row / tau).max() + 0.5 * best for row, best in zip(COSINES.numpy(), local, strict=True)]
    np.testing.assert_allclose(gl_mcm(COSINES, PATCH_COSINES, tau, local_weight=0.5), both, rtol=1e-12)


def test_gl_mcm_of_weight_zero_is_mcm_and_of_the_image_as_its_patch_is_twice_it():
    assert torch.equal(gl_mcm(COSINES, PATCH_COSINES, local_weight=0.0), mcm(COSINES))
    torch.testing.assert_close(gl_mcm(COSINES, COSINES[:, None]), 2 * mcm(COSINES))


def test_mcm_is_msp_of_the_scaled_cosines_and_energy_of_low_temperature_the_maximum():
    torch.testing.assert_close(mcm(COSINES, 1 / 37.0), msp(37.0 * COSINES), rtol=1e-13, atol=0)
    torch.testing.assert_close(energy(COSINES, 1e-4), COSINES.amax(1), rtol=0, atol=2e-4)


def test_msp_keeps_confident_samples_apart():
    logits = torch.tensor([[1000.0, 985.0], [1000.0, 986.0], [1000.0, 987.0]])
    assert msp(logits).unique(sorted=True).tolist() == msp(logits).flip(0).tolist() and len(msp(logits).unique()) == 3
    torch.testing.assert_close(msp(logits).double(), msp(logits.double()), rtol=2e-7, atol=0)


def test_variance_is_that_of_the_softmax_and_keeps_its_digits_for_a_thousand_classes():
    expected = [softmax(row / 0.3).var() for row in COSINES.numpy()]
    np.testing.assert_allclose(variance(COSINES, 0.3), expected, rtol=1e-12)
    many = unit(50, 64) @ unit(1000, 64, seed=3).T
    assert variance(many).max() < 1e-7
    torch.testing.assert_close(variance(many.float()), variance(many), rtol=1e-5, atol=0)
    assert variance(torch.full((1, 9), 0.2)) == 0


@pytest.mark.parametrize("groups", [1, 2, 3, 7])
def test_neg_label_by_hand(groups):
    negatives = X @ unit(7, 6, seed=4).T
    size = 7 - 7 % groups
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5)).tolist()
    expected = []
    for c, n in zip(COSINES.tolist(), negatives.tolist(), strict=True):
        shuffled, masses = [n[i] for i in order], []
        for g in range(groups):
            group = shuffled[g * size // groups : (g + 1) * size // groups]
            positive = sum(math.exp(v / 0.2) for v in c)
            masses.append(positive / (positive + sum(math.exp(v / 0.2) for v in group)))
        expected.append(sum(masses) / groups)
    scores = neg_label(COSINES, negatives, temperature=0.2, groups=groups, seed=5)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_neg_label_makes_groups_of_a_hundred_and_tells_apart_what_float32_cannot():
    negatives = X @ unit(250, 6, seed=4).T
    assert torch.equal(neg_label(COSINES, negatives), neg_label(COSINES, negatives, groups=2))
    lead = torch.tensor([[0.50], [0.48]], dtype=torch.float32)
    scores = neg_label(lead, torch.full((2, 1), 0.30))
    assert scores[0] > scores[1] and scores[0].float() == scores[1].float() == 1.0


def test_negatives_are_the_candidates_least_like_any_class():
    candidates = torch.cat([W, -W, unit(20, 6, seed=8)])
    likeness = [np.quantile((candidates[i] @ W.T).numpy(), 0.95) for i in range(len(candidates))]
    expected = np.argsort(likeness, kind="stable")[:6]
    assert select_negatives(candidates, W, 6).tolist() == expected.tolist()
    assert not set(range(5)) & set(select_negatives(candidates, W, 6).tolist())


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, None])
def test_mahalanobis_equals_an_explicit_inverse(shrinkage):
    x, y = unit(60, 5, seed=6), torch.arange(60) % 3 * 2  # labels 0, 2, 4: gaps do not matter
    gaussians = fit_class_gaussians(x, y, shrinkage)
    u, labels, gamma = x.numpy(), y.numpy(), gaussians.shrinkage
    means = {c: u[labels == c].mean(0) for c in (0, 2, 4)}
    centred = np.stack([row - means[c] for row, c in zip(u, labels, strict=True)])
    scatter = centred.T @ centred / len(u)
    inverse = np.linalg.inv((1 - gamma) * scatter + gamma * np.trace(scatter) / 5 * np.eye(5))
    if shrinkage is None:
        from sklearn.covariance import ledoit_wolf

        np.testing.assert_allclose(inverse, np.linalg.inv(ledoit_wolf(centred, assume_centered=True)[0]), rtol=1e-9)
    queries = unit(9, 5, seed=7).numpy()
    expected = [-min((q - m) @ inverse @ (q - m) for m in means.values()) for q in queries]
    scores = mahalanobis(torch.from_numpy(queries), gaussians)
    np.testing.assert_allclose(scores, expected, rtol=1e-10)
    assert mahalanobis(torch.from_numpy(queries).float(), gaussians).dtype == torch.float64


def test_mahalanobis_does_not_change_under_a_linear_map_of_the_features():
    x, y, q = unit(60, 5, seed=6), torch.arange(60) % 3, unit(9, 5, seed=7)
    a = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = mahalanobis(q, fit_class_gaussians(x, y, 0.0))
    torch.testing.assert_close(mahalanobis(q @ a, fit_class_gaussians(x @ a, y, 0.0)), before)


def test_singular_covariances_are_refused_with_a_way_out():
    x, y = unit(4, 9, seed=6), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="4 features of 2 classes in 9 dimensions is singular.*shrinkage above 0"):
        fit_class_gaussians(x, y, 0.0)
    assert mahalanobis(x, fit_class_gaussians(x, y)).isfinite().all()
    with pytest.raises(ValueError, match="more than one sample a class"):
        fit_class_gaussians(x, torch.arange(4))


def test_knn_distance_is_that_of_the_sorted_distances():
    points = unit(30, 6, seed=9)
    expected = [-sorted(np.linalg.norm(points.numpy() - q, axis=1))[3] for q in X.numpy()]
    np.testing.assert_allclose(knn_distance(X, NeighborIndex(points), 4), expected, rtol=1e-12)


def test_every_score_ranks_what_is_near_the_classes_above_what_is_not():
    axes = torch.eye(8, dtype=torch.float64)  # classes on the first five, nothing on the rest
    near, far = F.normalize(axes[:5] + 0.2 * unit(5, 8, seed=3), dim=-1), axes[5:]
    train = F.normalize(axes[:5].repeat(20, 1) + 0.4 * unit(100, 8, seed=5), dim=-1)
    gaussians, index = fit_class_gaussians(train, torch.arange(5).repeat(20)), NeighborIndex(train)
    w, negatives = axes[:5], F.normalize(axes[5:] + 0.2 * unit(3, 8, seed=7), dim=-1)
    for score in (
        lambda u: mcm(u @ w.T, 0.1),
        lambda u: variance(u @ w.T, 0.1),
        lambda u: gl_mcm(u @ w.T, (u @ w.T)[:, None], 0.1),
        lambda u: neg_label(u @ w.T, u @ negatives.T, 0.1),
        lambda u: mahalanobis(u, gaussians),
        lambda u: knn_distance(u, index, 3),
    ):
        assert score(near).min() > score(far).max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_mcm(COSINES[0]), r"patch_cosines must have shape \(\.\.\., P, K\)"),
        (lambda: gl_mcm(COSINES[:3], PATCH_COSINES), "same samples and classes"),
        (lambda: gl_mcm(COSINES, 50 * PATCH_COSINES), "look like scaled logits"),
        (lambda: neg_label(COSINES, 50 * COSINES), "negative_cosines must lie in"),
        (lambda: neg_label(COSINES, COSINES[:, :0]), "negative_cosines must have shape"),
        (lambda: neg_label(COSINES, COSINES, groups=6), "number of negatives, 5, got 6"),
        (lambda: select_negatives(X, W, 8), "between 1 and the 7 candidates"),
        (lambda: select_negatives(X, W, 1, percentile=95), "percentile must lie in"),
        (lambda: variance(COSINES, 0.0), "temperature must be positive"),
        (lambda: fit_class_gaussians(X, torch.arange(6)), r"labels must be \(7,\) integers"),
        (lambda: fit_class_gaussians(X * torch.nan, torch.arange(7)), "7 of 7 rows hold NaN"),
        (lambda: fit_class_gaussians(X, torch.arange(7) % 2, 1.5), "shrinkage must lie in"),
        (
            lambda: mahalanobis(X[:, :3], fit_class_gaussians(X, torch.arange(7) % 2)),
            "features have 3 dimensions, the Gaussians 6",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
