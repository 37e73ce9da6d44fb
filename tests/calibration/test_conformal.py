"""Conformal sets: the quantile by hand, the rules by a plain loop, the promise on data that are exchangeable."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robustft.calibration import ConformalSets, coverage_report
from robustft.calibration.conformal import PENALTIES, minimum_count
from robustft.clip.outputs import Outputs


def planted(n, seed, classes=6, sharp=1.5):
    """Probabilities, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    p = (sharp * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(1)


HELD_OUT, NEW = planted(400, 0), planted(3000, 1)
RULES = ("thr", "aps", "raps")


def plain_score(rule, p, k, k_reg=0, penalty=0.0):
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    rank = order.index(k) + 1
    if rule == "thr":
        return 1.0 - p[k]
    return sum(p[j] for j in order[:rank]) + penalty * max(0, rank - k_reg)


@pytest.mark.parametrize("rule", RULES)
def test_sets_are_those_of_a_plain_loop(rule):
    fixed = {"k_reg": 2, "penalty": 0.05} if rule == "raps" else {}
    p, y = (part[:59] for part in HELD_OUT)
    fitted = ConformalSets(rule, 0.8, empty=True, **fixed).fit(p, y)
    scores = sorted(plain_score(rule, row, int(k), **fixed) for row, k in zip(p.tolist(), y, strict=True))
    assert fitted.threshold_ == pytest.approx(scores[48 - 1], abs=1e-12)  # ceil(60 x 0.8) = 48
    rows = NEW[0][:40].tolist()
    q = fitted.threshold_ + 1e-12
    assert fitted.sets(NEW[0][:40]).tolist() == [
        [plain_score(rule, row, k, **fixed) <= q for k in range(6)] for row in rows
    ]


@pytest.mark.parametrize(
    ("n", "coverage", "rank"), [(9, 0.9, 9), (19, 0.9, 18), (10, 0.9, 10), (99, 0.95, 95), (999, 0.999, 999)]
)
def test_the_threshold_is_the_exact_finite_sample_quantile(n, coverage, rank):
    ascending = np.linspace(0.1, 0.9, n)  # the scores 1 - p_y, in disorder
    shuffled = np.random.default_rng(0).permutation(ascending)
    p = np.stack([1.0 - shuffled, shuffled], 1)
    assert ConformalSets("thr", coverage).fit(p, np.zeros(n, int)).threshold_ == pytest.approx(ascending[rank - 1])


def test_fewer_images_than_the_coverage_needs_are_refused():
    assert [minimum_count(c) for c in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    p, y = (part[:98] for part in HELD_OUT)
    with pytest.raises(ValueError, match="coverage 0.99 needs at least 99 held-out images, got 98"):
        ConformalSets("aps", 0.99).fit(p, y)
    with pytest.raises(ValueError, match="which are 8; coverage 0.9 needs 9"):
        ConformalSets("raps").fit(p[:40], y[:40])


@pytest.mark.parametrize(
    ("rule", "randomized"), [("thr", False), ("aps", False), ("aps", True), ("raps", False), ("raps", True)]
)
def test_coverage_over_many_draws_is_the_one_asked_for(rule, randomized):
    found = []
    for seed in range(30):
        p, y = planted(199, 100 + seed)
        options = {"k_reg": 2, "penalty": 0.05} if rule == "raps" else {}
        sets = ConformalSets(rule, 0.8, empty=True, randomized=randomized, seed=seed, **options).fit(p[:99], y[:99])
        found.append(coverage_report(sets.sets(p[99:]), y[99:]).all.coverage)
    # Beta(80, 20) of 99 images has a standard deviation of 0.04, a share of 100 images another 0.04.
    assert abs(np.mean(found) - 0.8) < 3 * math.hypot(0.04, 0.04) / math.sqrt(30)


def test_classes_of_equal_probability_are_ranked_by_their_number():
    p = torch.full((60, 64), 1 / 64, dtype=torch.float64)
    fitted = ConformalSets("aps", 0.5).fit(p, torch.full((60,), 20))
    assert fitted.threshold_ == pytest.approx(21 / 64) and fitted.sets(p[:1]).tolist() == [[k <= 20 for k in range(64)]]


def test_no_set_is_empty_unless_that_is_asked_for():
    p, y = planted(500, 2, sharp=6.0)
    strict, kind = (ConformalSets("thr", 0.5, empty=empty).fit(p, y) for empty in (True, False))
    new = planted(500, 3, sharp=6.0)[0]
    few, all_ = strict.sets(new), kind.sets(new)
    assert (few.sum(1) == 0).any() and (all_.sum(1) > 0).all()
    assert (few <= all_).all() and all_.gather(1, new.argmax(1, keepdim=True)).all()


def test_randomized_sets_are_smaller_and_a_function_of_the_seed():
    plain, one, same, other = (
        ConformalSets("aps", 0.8, randomized=r, seed=s).fit(*HELD_OUT).sets(NEW[0])
        for r, s in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    assert one.equal(same) and not one.equal(other)
    assert one.sum() < plain.sum()


def test_raps_tunes_on_a_part_that_calibrates_nothing():
    fitted = ConformalSets("raps", 0.8).fit(*planted(500, 4, classes=40))
    assert fitted.count_ == 400 and fitted.penalty_ in PENALTIES and 1 <= fitted.k_reg_ <= 40
    assert ConformalSets("raps", 0.8, k_reg=3, penalty=0.1).fit(*HELD_OUT).count_ == 400
    # Long tails are what it cuts.
    long = ConformalSets("aps", 0.8).fit(*planted(500, 4, classes=40))
    new = planted(500, 5, classes=40)[0]
    assert fitted.sets(new).sum(1).max() < long.sets(new).sum(1).max()


def test_outputs_are_taken_with_their_labels():
    p, y = HELD_OUT
    outputs = Outputs(logits=p.log(), labels=y)
    one, two = ConformalSets().fit(outputs), ConformalSets().fit(p, y)
    assert one.threshold_ == pytest.approx(two.threshold_) and one.sets(outputs).equal(two.sets(p))


@pytest.mark.parametrize("rule", RULES)
def test_saved_sets_are_the_same_and_equal_ones_equal_bytes(rule, tmp_path):
    one = ConformalSets(rule, 0.8).fit(*HELD_OUT)
    assert one.save(tmp_path) == tmp_path / "conformal.safetensors"
    loaded = ConformalSets.load(tmp_path)
    assert vars(loaded) == vars(one) and loaded.sets(NEW[0]).equal(one.sets(NEW[0]))
    loaded.save(tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "conformal.safetensors").read_bytes()


def test_misuse_is_refused(tmp_path):
    for options, message in (
        ({"rule": "lac"}, "rule must be one of"),
        ({"coverage": 1.0}, r"coverage must lie in \(0, 1\), got 1.0"),
        ({"rule": "thr", "randomized": True}, "'thr' draws nothing"),
        ({"rule": "aps", "penalty": 0.1}, "are of 'raps', got rule 'aps'"),
        ({"rule": "raps", "k_reg": -1}, "k_reg must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ConformalSets(**options)
    p, y = HELD_OUT
    with pytest.raises(ValueError, match="has learnt nothing yet"):
        ConformalSets().sets(p)
    with pytest.raises(ValueError, match="labels are missing"):
        ConformalSets().fit(p)
    with pytest.raises(ValueError, match="these look like logits"):
        ConformalSets().fit(p.log(), y)
    with pytest.raises(ValueError, match=r"floating \(N, 6\), the classes of the fit"):
        ConformalSets().fit(p, y).sets(p[:, :5])
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="truncated, or no ConformalSets"):
        ConformalSets.load(tmp_path / "x")


def test_the_report_counts_by_size_and_by_class_with_exact_bands():
    sets = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]]).bool()
    report = coverage_report(sets, torch.tensor([0, 1, 2, 0, 0]), ["a", "b", "c"])
    assert report.all[:3] == ("all", 5, 0.6) and report.all.mean_size == 1.4
    assert [row[:3] for row in report.by_size] == [("0-1", 3, 1 / 3), ("2-3", 2, 1.0)]
    assert [row[:3] for row in report.by_class] == [("a", 3, 1 / 3), ("b", 1, 1.0), ("c", 1, 1.0)]
    for row in (report.all, *report.by_size, *report.by_class):
        n, k = row.images, round(row.coverage * row.images)

        def share(p, counts, n=n):
            return sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in counts)

        assert row.lower == 0.0 if k == 0 else share(row.lower, range(k, n + 1)) == pytest.approx(0.025)
        assert row.upper == 1.0 if k == n else share(row.upper, range(k + 1)) == pytest.approx(0.025)
    empty = coverage_report(sets, torch.tensor([0, 0, 0, 0, 0])).by_class[1]
    assert empty.images == 0 and math.isnan(empty.coverage)
    with pytest.raises(TypeError, match="sets must be bool"):
        coverage_report(sets.float(), torch.zeros(5).long())
