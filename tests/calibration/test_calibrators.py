"""Calibrators after training: each the optimum it claims, on files and off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robustft.calibration import calibrators as posthoc
from robustft.calibration.calibrators import HistogramBinning, IsotonicCalibration, TemperatureScaling, VectorScaling
from robustft.calibration.measures import calibration_report, fit_temperature

ALL = [TemperatureScaling, VectorScaling, IsotonicCalibration, HistogramBinning]


def overconfident(n, seed, classes=5):
    """Logits of which half is the truth: labels are drawn from softmax(z / 2)."""
    generator = torch.Generator().manual_seed(seed)
    z = 6.0 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return z, torch.multinomial((z / 2).softmax(1), 1, generator=generator).squeeze(1)


TRAIN, TEST = overconfident(1500, 0), overconfident(1500, 1)


@pytest.mark.parametrize("kind", ALL)
def test_calibrators_mend_overconfidence_on_data_they_have_not_seen(kind):
    before = calibration_report(TEST[0].softmax(1), TEST[1])
    p = kind().fit(*TRAIN).probabilities(TEST[0])
    after = calibration_report(p, TEST[1])
    assert p.dtype == torch.float64 and (p >= 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(1500, dtype=torch.float64))
    assert after.ece < 0.5 * before.ece and after.nll < before.nll and after.brier < before.brier
    assert after.ece < 3 * after.noise_floor


@pytest.mark.parametrize("kind", [TemperatureScaling, IsotonicCalibration])
def test_what_promises_to_keep_predictions_keeps_them_and_their_order(kind):
    p = kind().fit(*TRAIN).probabilities(TEST[0])
    assert p.argsort(1).equal(TEST[0].argsort(1))


def test_temperature_scaling_is_the_fitted_temperature():
    calibrator = TemperatureScaling().fit(*TRAIN)
    assert calibrator.temperature_ == fit_temperature(*TRAIN) and abs(calibrator.temperature_ - 2.0) < 0.1
    torch.testing.assert_close(calibrator.probabilities(TEST[0]), (TEST[0] / calibrator.temperature_).softmax(1))


@pytest.mark.parametrize("l2", [0.0, 0.03])
def test_vector_scaling_is_the_optimum_that_scipy_finds(l2):
    from scipy.optimize import minimize

    z, y = TRAIN[0].numpy(), TRAIN[1].numpy()
    temperature = fit_temperature(*TRAIN)

    def objective(parameters):
        a, b = parameters[:5], parameters[5:]
        logits = a * z + b
        top = logits.max(1, keepdims=True)
        nll = (top[:, 0] + np.log(np.exp(logits - top).sum(1)) - logits[np.arange(len(z)), y]).mean()
        return nll + l2 / 2 * (((a * temperature - 1) ** 2).sum() + (b**2).sum())

    best = minimize(objective, np.r_[np.full(5, 0.4), np.zeros(5)], method="BFGS", options={"gtol": 1e-7})
    fitted = VectorScaling(l2=l2).fit(*TRAIN)
    found = np.r_[fitted.scale_, fitted.bias_]
    assert objective(found) <= best.fun + 1e-12
    if l2:  # without the penalty a common bias is free
        np.testing.assert_allclose(found, best.x, atol=1e-5)


def test_vector_scaling_undoes_a_scale_and_bias_of_each_class_and_spares_absent_classes():
    a, b = torch.tensor([0.5, 2.0, 1.0, 3.0, 1.5]), torch.tensor([3.0, -2.0, 0.0, 1.0, -2.0])
    z, y = overconfident(4000, 2)
    changed = (z / 2 - b) / a
    assert calibration_report(changed.softmax(1), y).ece > 0.1
    report = calibration_report(VectorScaling(l2=0.0).fit(changed, y).probabilities(changed), y)
    assert report.ece < 2 * report.noise_floor
    few = y != 3
    fitted = VectorScaling(l2=10.0).fit(z[few], y[few])
    torch.testing.assert_close(
        fitted.scale_[3] * fit_temperature(z[few], y[few]), torch.tensor(1.0).double(), rtol=0.05, atol=0
    )


def test_isotonic_map_is_the_pooled_regression_and_rows_are_distributions():
    z, y = overconfident(40, 3, classes=3)
    calibrator = IsotonicCalibration().fit(z, y)
    p, hits = z.softmax(1).numpy().ravel(), F.one_hot(y, 3).numpy().ravel().astype(float)
    order = np.argsort(p)
    blocks = [[hits[i], 1.0] for i in order]  # pool adjacent violators
    i = 0
    while i < len(blocks) - 1:
        if blocks[i][0] > blocks[i + 1][0]:
            (u, m), (v, n) = blocks[i], blocks.pop(i + 1)
            blocks[i] = [(u * m + v * n) / (m + n), m + n]
            i = max(i - 1, 0)
        else:
            i += 1
    f = np.empty(len(p))
    f[order] = np.concatenate([[value] * int(count) for value, count in blocks])
    g = f.reshape(40, 3) + 1e-6 * p.reshape(40, 3)
    np.testing.assert_allclose(calibrator.probabilities(z), g / g.sum(1, keepdims=True), atol=1e-12)


def test_histogram_binning_gives_each_bin_its_accuracy_and_the_rest_in_proportion():
    calibrator = HistogramBinning(bins=4).fit(*TRAIN)
    p, q = TRAIN[0].softmax(1), calibrator.probabilities(TRAIN[0])
    confidence, top = p.max(1)
    correct = (top == TRAIN[1]).double()
    rank = confidence.argsort().argsort() * 4 // 1500
    for b in range(4):
        torch.testing.assert_close(
            q.gather(1, top[:, None])[rank == b, 0], correct[rank == b].mean().expand(int((rank == b).sum()))
        )
    others = p.scatter(1, top[:, None], 0.0)
    torch.testing.assert_close(
        F.normalize(q.scatter(1, top[:, None], 0.0), p=1, dim=1), F.normalize(others, p=1, dim=1)
    )
    # On its own data every bin's accuracy and confidence agree, so the ECE of the same bins is zero.
    assert sum(abs(float(correct[rank == b].mean() - calibrator.accuracy_[b])) for b in range(4)) < 1e-12


def test_histogram_binning_of_certain_rows_shares_the_rest_evenly():
    z = torch.tensor([[800.0, 0.0, 0.0]] * 4)
    p = HistogramBinning(bins=1).fit(z, torch.tensor([0, 0, 0, 1])).probabilities(z)
    torch.testing.assert_close(p[0], torch.tensor([0.75, 0.125, 0.125], dtype=torch.float64))


@pytest.mark.parametrize("kind", ALL)
def test_saved_calibrators_give_the_same_bits_and_equal_ones_equal_bytes(kind, tmp_path):
    one, two = kind().fit(*TRAIN), kind().fit(*TRAIN)
    assert two.save(tmp_path) == tmp_path / "calibrator.safetensors" and one.save(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "calibrator.safetensors").read_bytes()
    loaded = posthoc.load(tmp_path)
    assert type(loaded) is kind
    assert torch.equal(loaded.probabilities(TEST[0]), one.probabilities(TEST[0]))
    loaded.save(tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()


def test_options_are_saved_too(tmp_path):
    HistogramBinning(bins=3).fit(*TRAIN).save(tmp_path / "h")
    VectorScaling(l2=0.5).fit(*TRAIN).save(tmp_path / "v")
    assert posthoc.load(tmp_path / "h").bins == 3 and posthoc.load(tmp_path / "v").l2 == 0.5


@pytest.mark.parametrize("kind", ALL)
def test_misuse_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="has learnt nothing yet: call fit"):
        kind().probabilities(TEST[0])
    with pytest.raises(ValueError, match="has learnt nothing yet: call fit"):
        kind().save(tmp_path / "x")
    with pytest.raises(ValueError, match="logits must be finite, but 1500 of 1500"):
        kind().fit(TRAIN[0] * torch.nan, TRAIN[1])
    with pytest.raises(ValueError, match=r"floating \(N, 5\), the classes of the fit"):
        kind().fit(*TRAIN).probabilities(TEST[0][:, :3])


def test_bad_options_and_foreign_files_are_refused(tmp_path):
    for make in (lambda: VectorScaling(l2=-1.0), lambda: HistogramBinning(bins=0)):
        with pytest.raises(ValueError, match="must be at least"):
            make()
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="truncated, or no Calibrator"):
        posthoc.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        posthoc.load(tmp_path / "y")
