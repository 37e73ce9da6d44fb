"""VRF against a restatement in float64, its exact weights, its choices, its analysis, and its ways to fail."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from robustft.clip.outputs import Outputs
from robustft.ensembles.vrf_weights import A_GRID, B_GRID, grid, weigh
from robustft.methods import VRF, VRFFeatures

DIMENSIONS, CLASSES = 6, 4


def make(count, seed, dtype=torch.float64, zero_shot_strength=1.0):
    """Features around class means; the fine-tuned model is better, and best in the half where the first axis is > 0."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=g)
    u = F.normalize(means[labels] + torch.randn(count, DIMENSIONS, generator=g, dtype=torch.float64), dim=1)
    noise = torch.randn(2, count, CLASSES, generator=g, dtype=torch.float64)
    target = F.one_hot(labels, CLASSES).double()
    near = 1.0 + 3.0 * (u[:, :1] > 0)
    return pair(
        u.to(dtype),
        (4.0 * (zero_shot_strength * target + noise[0])).to(dtype),
        (9.0 * (near * target + noise[1])).to(dtype),
        labels,
    )


def pair(features, zero_shot_logits, fine_tuned_logits, labels=None):
    return VRFFeatures(Outputs(logits=zero_shot_logits), Outputs(features, logits=fine_tuned_logits, labels=labels))


@pytest.fixture(scope="module")
def sets():
    return make(400, 0), make(300, 1), make(250, 2)


def restated(train, validation, test, k, a, b, temperatures):
    """p of the paper, one sample after the other."""
    members = [
        train.features[i]
        for i in range(len(train))
        if train.fine_tuned.logits[i].argmax() == train.labels[i] != train.zero_shot.logits[i].argmax()
    ]
    rows = []
    for u, zs, ft in zip(test.features, test.zero_shot.logits, test.fine_tuned.logits, strict=True):
        d = sorted(float(((u - v) ** 2).sum()) for v in members)[k - 1]
        w = 1.0 / (1.0 + math.exp((d - a) / b))
        rows.append(w * (ft / temperatures[1]).softmax(0) + (1 - w) * (zs / temperatures[0]).softmax(0))
    return torch.stack(rows), members


@pytest.mark.parametrize("d, w", [(0.4, 0.86), (0.8, 0.76), (1.0, 0.70), (1.2, 0.62), (1.4, 0.54), (1.6, 0.46)])
def test_weights_of_the_papers_distances_at_its_a_and_b(d, w):
    assert round(weigh(torch.tensor([d], dtype=torch.float64), 1.5, 0.6, "sigmoid").item(), 2) == w


@pytest.mark.parametrize("k", [1, 3])
def test_probabilities_equal_the_plain_restatement(sets, k):
    train, validation, test = sets
    vrf = VRF(k=k, a=0.5, b=0.2, temperatures=(0.7, 1.9)).fit(train, validation)
    expected, members = restated(train, validation, test, k, 0.5, 0.2, (0.7, 1.9))
    assert torch.equal(vrf.failure_set_, torch.stack(members)) and 0 < len(members) < len(train)
    torch.testing.assert_close(vrf.probabilities(test), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vrf.log_probabilities(test), expected.log(), rtol=1e-9, atol=1e-9)


def test_streamed_samples_get_the_probabilities_they_get_together(sets):
    train, validation, test = sets
    vrf = VRF().fit(train, validation)
    one_by_one = torch.cat([vrf.probabilities(part) for part in test.rows(1)])
    torch.testing.assert_close(one_by_one, vrf.probabilities(test), rtol=1e-13, atol=0)


def test_neighbour_rules_of_paper_and_released_code():
    train = make(3000, 3, zero_shot_strength=-3.0)
    size = int(train.failures().sum())
    assert size > 2000
    fits = {k: VRF(k=k, a=1.0, b=1.0, temperatures=None).fit(train, make(50, 4)) for k in (None, "released", 7)}
    assert {k: fit.k_ for k, fit in fits.items()} == {None: size // 1000, "released": round(1000 * size / 3000), 7: 7}


def test_a_and_b_have_the_best_accuracy_and_of_equals_the_least_fine_tuned_weight(sets):
    train, validation, _ = sets
    vrf = VRF().fit(train, validation)
    assert len(vrf.grid_) == len(A_GRID) * len(B_GRID)
    for point in (vrf.grid_[0], vrf.grid_[57]):
        p, _ = restated(train, validation, validation, vrf.k_, point.a, point.b, vrf.temperatures_)
        accuracy = (p.argmax(1) == validation.labels).double().mean().item()
        nll = F.nll_loss(p.log(), validation.labels).item()
        weight = weigh(vrf.distances(validation.features), point.a, point.b, "sigmoid").mean().item()
        assert (point.accuracy, point.weight, point.nll) == pytest.approx((accuracy, weight, nll), rel=1e-9)
    ties = [point for point in vrf.grid_ if point.accuracy == max(p.accuracy for p in vrf.grid_)]
    chosen = next(point for point in vrf.grid_ if (point.a, point.b) == (vrf.a_, vrf.b_))
    assert chosen in ties and chosen.weight == min(point.weight for point in ties) == pytest.approx(vrf.alpha_)


def test_the_grid_is_the_papers_where_distances_are_and_moves_with_their_scale():
    distances = torch.linspace(0.4 - 0.012 / 0.98, 1.6 + 0.012 / 0.98, 4001, dtype=torch.float64)  # percentiles .4, 1.6
    pairs = grid(distances, None, None, "sigmoid")
    assert [a for a, _ in pairs[:: len(B_GRID)]] == pytest.approx(A_GRID, abs=1e-6)
    assert [b for _, b in pairs[: len(B_GRID)]] == pytest.approx(B_GRID, abs=1e-6)
    moved = grid(0.01 * distances + 3.0, None, None, "sigmoid")
    torch.testing.assert_close(torch.tensor(moved), torch.tensor([(3.0 + 0.01 * a, 0.01 * b) for a, b in pairs]))
    assert grid(distances, (1.2, 1.3), (0.5,), "sigmoid") == [(1.2, 0.5), (1.3, 0.5)]
    assert {b for _, b in grid(distances, None, None, "binary")} == {0.0}


@pytest.mark.parametrize("rule", ["confidence", "nll"])
def test_temperatures_are_each_models_own_from_validation_data(sets, rule):
    train, validation, _ = sets
    temperatures = VRF(temperatures=rule).fit(train, validation).temperatures_
    for logits, t in zip((validation.zero_shot.logits, validation.fine_tuned.logits), temperatures, strict=True):
        if rule == "confidence":
            accuracy = (logits.argmax(1) == validation.labels).double().mean()
            assert abs((logits / t).softmax(1).amax(1).mean() - accuracy) <= 1.1e-3
        else:
            here, *beside = (F.cross_entropy(logits / (t * f), validation.labels) for f in (1.0, 0.99, 1.01))
            assert here < min(beside)


def test_weighting_ablations():
    d = torch.tensor([0.0, 0.4, 1.0, 1.5, 2.0, 9.0], dtype=torch.float64)
    assert weigh(d, 1.0, 0.3, "binary").tolist() == [1, 1, 1, 0, 0, 0]
    linear = weigh(d, 1.0, 0.5, "linear")
    assert linear.tolist() == pytest.approx([1.0, 0.8, 0.5, 0.25, 0.0, 0.0])
    slope = [
        (weigh(d[2] + 1e-5, 1.0, 0.5, kind) - weigh(d[2] - 1e-5, 1.0, 0.5, kind)).item()
        for kind in ("linear", "sigmoid")
    ]
    assert slope[0] == pytest.approx(slope[1], rel=1e-6), "the linear weight is the sigmoid's tangent at a"


def test_whole_training_set_as_reference(sets):
    train, validation, test = sets
    vrf = VRF(k=2, reference="train").fit(train, validation)
    assert torch.equal(vrf.failure_set_, train.features)
    expected = torch.cdist(test.features, train.features).square().kthvalue(2, dim=1).values
    torch.testing.assert_close(vrf.distances(test.features), expected)


@pytest.mark.parametrize("weighting", ["sigmoid", "linear", "binary"])
def test_at_alpha_has_that_mean_weight_on_validation_data_and_both_models_at_its_ends(sets, weighting):
    train, validation, test = sets
    vrf = VRF(weighting=weighting, temperatures=None).fit(train, validation)
    for alpha in (0.1, 0.5, 0.9):
        moved = vrf.at(alpha)
        mean = moved.weights(validation.features).mean().item()
        assert mean == pytest.approx(alpha, abs=1e-9 if weighting != "binary" else 1 / len(validation))
        assert (moved.alpha_, moved.b_) == (pytest.approx(mean), vrf.b_)
    torch.testing.assert_close(vrf.at(0).probabilities(test), test.zero_shot.logits.softmax(1))
    torch.testing.assert_close(vrf.at(1).probabilities(test), test.fine_tuned.logits.softmax(1))
    assert vrf.alpha_ == pytest.approx(vrf.weights(validation.features).mean().item())


def test_accuracy_ratio_counts_both_models_in_bins_of_equal_size(sets):
    train, validation, test = sets
    vrf = VRF().fit(train, validation)
    bins = vrf.accuracy_ratio(test, bins=7)
    distances, weights = vrf.distances(test.features), vrf.weights(test.features)
    zero_shot, fine_tuned = test.correct()
    order = distances.argsort(stable=True)
    sizes = [36] * 5 + [35] * 2
    for found, rows in zip(bins, order.split(sizes), strict=True):
        assert (found.lower, found.upper) == (distances[rows].min(), distances[rows].max())
        assert found.count == len(rows) and found.weight == pytest.approx(weights[rows].mean().item())
        expected = zero_shot[rows].double().mean().item(), fine_tuned[rows].double().mean().item()
        assert (found.zero_shot_accuracy, found.fine_tuned_accuracy) == pytest.approx(expected)
        assert found.ratio == pytest.approx(expected[1] / expected[0])
    with pytest.raises(ValueError, match=r"bins must lie in \[1, 250\]"):
        vrf.accuracy_ratio(test, bins=251)


def test_saved_and_loaded_predicts_the_same_bits(sets, tmp_path):
    train, validation, test = sets
    vrf = VRF(k=2, weighting="linear").fit(train, validation)
    path = vrf.save(tmp_path / "new folder" / "vrf.safetensors")
    loaded = VRF.load(path)
    assert torch.equal(loaded.probabilities(test), vrf.probabilities(test))
    assert torch.equal(loaded.at(0.3).probabilities(test), vrf.at(0.3).probabilities(test))
    assert loaded.grid_ == vrf.grid_ and loaded.alpha_ == vrf.alpha_
    assert path.read_bytes() == loaded.save(tmp_path / "again").read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_files_that_hold_no_vrf_are_refused_by_name(sets, tmp_path):
    path = VRF().fit(*sets[:2]).save(tmp_path / "vrf")
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        VRF.load(tmp_path / "none")
    from safetensors.torch import save_file

    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x80\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="vrf: truncated, or no VRF saved by robustft"):
            VRF.load(path)
    save_file({"points": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no VRF saved by robustft"):
        VRF.load(path)


def changed(data, **parts):
    zero_shot, fine_tuned = data.zero_shot.logits, data.fine_tuned.logits
    given = {"features": data.features, "zero_shot_logits": zero_shot, "fine_tuned_logits": fine_tuned}
    return pair(**{**given, "labels": data.labels, **parts})


def test_failure_sets_that_are_empty_or_tiny(sets):
    train, validation, _ = sets
    perfect = changed(train, zero_shot_logits=50.0 * F.one_hot(train.labels, CLASSES).double())
    with pytest.raises(ValueError, match="failure set is empty.*OutputEnsemble serves"):
        VRF().fit(perfect, validation)
    few = train.failures().nonzero()[:5, 0]
    logits = perfect.zero_shot.logits.clone()
    logits[few] = train.zero_shot.logits[few]
    with pytest.warns(UserWarning, match="failure set has 5 samples only"):
        VRF().fit(changed(train, zero_shot_logits=logits), validation)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="k = 6 is larger than the failures set of 5"):
        VRF(k=6).fit(changed(train, zero_shot_logits=logits), validation)


def test_validation_data_without_errors(sets):
    train, validation, _ = sets
    right = 5.0 * F.one_hot(validation.labels, CLASSES).double()
    perfect = changed(validation, zero_shot_logits=right, fine_tuned_logits=2.0 * right)
    with pytest.warns(UserWarning, match="neither classifier errs.*lean most on the zero-shot"):
        VRF().fit(train, perfect)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VRF(a=1.0, b=0.5).fit(train, perfect)
    with pytest.raises(ValueError, match='zero-shot classifier is right on all 300.*temperatures="confidence"'):
        VRF(temperatures="nll").fit(train, perfect)


def test_misuse_is_refused_with_a_reason(sets):
    train, validation, test = sets
    for arguments, reason in [
        ({"k": 0}, "k must be a positive integer"),
        ({"k": "paper"}, "k must be a positive integer"),
        ({"a": "1.5"}, "a must be a finite number, several of them"),
        ({"a": ()}, "a must be a finite number"),
        ({"b": math.nan}, "b must be a finite number"),
        ({"b": (0.5, 0.0)}, "b must be positive"),
        ({"b": 0.5, "weighting": "binary"}, "has no width"),
        ({"weighting": "step"}, "weighting must be one of 'sigmoid'"),
        ({"reference": "all"}, "reference must be"),
        ({"temperatures": "both"}, "temperatures must be None, 'confidence' or 'nll'"),
        ({"temperatures": (1.0, -1.0)}, "temperatures must be positive"),
    ]:
        with pytest.raises(ValueError, match=reason):
            VRF(**arguments)
    for call in (lambda v: v.probabilities(test), lambda v: v.at(0.5), lambda v: v.save("x")):
        with pytest.raises(ValueError, match="no failure set yet: call fit"):
            call(VRF())
    with pytest.raises(ValueError, match="labels are needed"):
        VRF().fit(changed(train, labels=None), validation)
    for parts, reason in [
        ({"features": 2.0 * train.features}, "unit norm, got norms from 2 to 2.*normalize"),
        ({"features": math.nan * train.features}, "unit norm, got norms from nan"),
        ({"fine_tuned_logits": math.inf * train.fine_tuned.logits}, "must be finite"),
        ({"features": train.features[:5]}, "of the same samples"),
        ({"zero_shot_logits": train.zero_shot.logits[:, :3]}, "of the same samples"),
        ({"labels": train.labels[:5]}, "labels must be integers"),
        ({"labels": train.labels + 1}, r"labels must lie in \[0, 4\)"),
    ]:
        with pytest.raises(ValueError, match=reason):
            changed(train, **parts)
    with pytest.raises(ValueError, match="at least 2 classes"):
        pair(train.features, train.zero_shot.logits[:, :1], train.fine_tuned.logits[:, :1])


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_ends_of_the_frontier_come_back_from_disk(sets, tmp_path, alpha):
    """Their centre `a` is infinite."""
    train, validation, test = sets
    vrf = VRF().fit(train, validation).at(alpha)
    loaded = VRF.load(vrf.save(tmp_path / "vrf"))
    assert loaded.a_ == vrf.a_ and abs(vrf.a_) == float("inf")
    assert torch.equal(loaded.probabilities(test), vrf.probabilities(test))
