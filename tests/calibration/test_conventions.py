"""Conventions of papers: their arithmetic, restated, and what it distorts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from robustft.calibration.measures import calibration_report


def sample(n=700, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return z.softmax(1), torch.multinomial((z / 2).softmax(1), 1, generator=generator).squeeze(1)


def certain(p, share):
    """The first rows made certain, a confidence of exactly 1."""
    p = p.clone()
    rows = int(share * len(p))
    p[:rows] = torch.nn.functional.one_hot(p[:rows].argmax(1), p.shape[1]).double()
    return p


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_dac_is_its_formula_sample_by_sample(share):
    p, y = sample()
    p = certain(p, share)
    report = calibration_report(p, y, convention="dac")
    confidence, correct = p.max(1).values.tolist(), (p.argmax(1) == y).tolist()
    bins = [[] for _ in range(10)]
    for c, a in zip(confidence, correct, strict=True):
        bins[min(int(np.floor(c * 10 + 1e-12)), 9)].append((c, a))
    ece, weighted = 0.0, []
    for members in bins:
        seen = [(c, a) for c, a in members if c < 1.0]  # lost from the means, kept in the weight
        if seen:
            ece += len(members) / 700 * abs(np.mean([c for c, _ in seen]) - np.mean([a for _, a in seen]))
        if members:
            weighted.append(len(members) / 700 * abs(np.mean([c - a for c, a in members])))
    np.testing.assert_allclose((report.ece, report.mce), (ece, max(weighted)), rtol=1e-12)
    assert (report.protocol, report.scheme) == ("dac", "width")


def test_dacs_ace_is_that_of_scikit_learns_quantile_bins():
    from sklearn.preprocessing import KBinsDiscretizer

    p, y = sample()
    confidence, correct = p.max(1).values.numpy(), (p.argmax(1) == y).numpy()
    binner = KBinsDiscretizer(10, encode="ordinal", strategy="quantile", quantile_method="linear")
    cell = binner.fit_transform(confidence[:, None])[:, 0]
    expected = sum(
        (cell == b).mean() * abs(confidence[cell == b].mean() - correct[cell == b].mean()) for b in range(10)
    )
    np.testing.assert_allclose(calibration_report(p, y, convention="dac").ace, expected, rtol=1e-12)


def test_dac_loses_the_errors_of_certain_predictions():
    p = torch.zeros(100, 2, dtype=torch.float64)
    p[:, 0] = 1.0
    y = (torch.arange(100) < 40).long()  # certain, and right 60 times in 100
    assert calibration_report(p, y).ece == pytest.approx(0.4)
    assert calibration_report(p, y, convention="dac").ece == 0.0


def test_dacs_mce_is_never_above_its_ece_without_certain_predictions():
    p, y = sample()
    report, plain = calibration_report(p, y, convention="dac"), calibration_report(p, y, bins=10)
    assert report.mce <= report.ece < plain.mce
    assert report.ece == pytest.approx(plain.ece) and report.mce == pytest.approx(plain.mass_weighted_mce)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("carot", {"bins": 10, "protocol": "per_batch"}), ("clipcalib", {"bins": 10}), ("c-tpt", {"bins": 20})],
)
def test_the_others_are_settings_of_the_report(name, settings):
    p, y = sample(1200)
    expected = dataclasses.replace(calibration_report(p, y, **settings), protocol=name)
    assert calibration_report(p, y, convention=name) == expected


def test_carot_scores_a_perfectly_calibrated_model_several_times_too_high():
    p, y = sample(5000, seed=1)
    p = (p.log() / 2).softmax(1)  # the distribution that the labels were drawn from
    assert calibration_report(p, y, convention="carot").ece > 2 * calibration_report(p, y, bins=10).ece


def test_unknown_conventions_and_mixtures_are_refused():
    p, y = sample()
    with pytest.raises(ValueError, match="convention must be one of .*'dac'.*got 'DAC'"):
        calibration_report(p, y, convention="DAC")
    with pytest.raises(ValueError, match="convention 'dac' fixes bins, scheme, protocol and batch_size"):
        calibration_report(p, y, bins=20, convention="dac")
