"""Calibration after training: maps of logits z (N, K) to probabilities, fitted on held-out labelled data.

    temperature    softmax(z / T)                              1 number       keeps every prediction
    vector         softmax(a * z + b)                          2 K numbers    may change predictions
    isotonic       f(softmax(z)) normalised, f increasing      one f          keeps every prediction
    histogram      c becomes the accuracy of its bin           B numbers      changes few: where a bin is mostly wrong

c = max_k softmax(z)_k is the confidence. All have one shape:

    calibrator = TemperatureScaling().fit(logits, labels)
    calibrator.probabilities(other_logits)              # (N, K) float64 on the logits' device; rows sum to 1
    calibrator.save("exported")                         # beside a classifier, or a file
    calibrator = robustft.calibration.calibrators.load("exported")

Fit on data that neither trained the model nor will measure it, and with few samples prefer few numbers. None of them
sees a shift: what they learnt in distribution holds outside only as far as the model errs there as it did here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.calibration.measures import calibration_report, check_labelled, fit_temperature
from robustft.files import CALIBRATOR_FILE, load_fitted, place, refusing, save_fitted
from robustft.ops import arguments


class Calibrator:
    """What all calibrators share: what `fit` learns, the names in `_learnt` with an underscore, and `classes_`."""

    _learnt: ClassVar[tuple[str, ...]]
    kinds: ClassVar[dict[str, type[Calibrator]]] = {}  # by name, as files call them: every subclass, one's own too
    classes_: int

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        Calibrator.kinds[cls.__name__] = cls

    def fit(self, logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Calibrator:
        """Learns from held-out logits (N, K), finite, and labels (N,), integers; float64, no gradient. Returns self."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor | np.ndarray) -> Tensor:
        """Calibrated probabilities (N, K), float64 on the logits' device, of the classes it was fitted on."""
        raise NotImplementedError

    def _check_learnt(self) -> None:
        """ValueError for what no `fit` learns: it comes from a file. A calibrator of one's own may leave it out."""

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all, and returns its path; `load` gives the calibrator back.

        path: a directory, such as `Classifier.save` wrote, where it becomes calibrator.safetensors, or a file.
        """
        self._check_fitted()
        path = place(path, CALIBRATOR_FILE)
        learnt = {name: torch.as_tensor(getattr(self, f"{name}_"), dtype=torch.float64) for name in self._learnt}
        options = {name: value for name, value in vars(self).items() if not name.endswith("_")}
        settings = {"type": type(self).__name__, "options": options, "classes": self.classes_}
        save_fitted(path, "Calibrator", settings, learnt)
        return path

    def _training(self, logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        z, y = check_labelled(logits, labels, "logits")
        self.classes_ = z.shape[1]
        return z.double().cpu(), y.cpu()

    def _logits(self, logits: Tensor | np.ndarray) -> Tensor:
        self._check_fitted()
        logits = arguments.array("logits", logits)
        if logits.ndim != 2 or logits.shape[1] != self.classes_ or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floating (N, {self.classes_}), the classes of the fit, got "
                f"{tuple(logits.shape)} {logits.dtype}"
            )
        z = logits.detach().double()
        impossible = (z.isnan() | (z == torch.inf)).any(1, keepdim=True)  # -inf is a class that is ruled out
        return z.masked_fill(impossible, torch.nan)

    def _check_fitted(self) -> None:
        if not hasattr(self, f"{self._learnt[-1]}_"):
            raise ValueError(f"{type(self).__name__} has learnt nothing yet: call fit(logits, labels)")


class TemperatureScaling(Calibrator):
    """softmax(z / T), T of least NLL: keeps every prediction, and their order within a sample.

    Of logits; `robustft.methods.Tempering` is the same of a predictor. Learnt: `temperature_`, as
    `calibration.fit_temperature` finds it (and warns about). Source: Guo et al. 2017 (arXiv 1706.04599), section 4.2.
    """

    _learnt = ("temperature",)

    def fit(self, logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> TemperatureScaling:
        self.temperature_ = fit_temperature(*self._training(logits, labels))
        return self

    def _check_learnt(self) -> None:
        temperature = torch.as_tensor(self.temperature_)
        if temperature.ndim or not float(temperature) > 0.0:
            raise ValueError(f"temperature must be a positive number, got {temperature!r:.80}")

    def probabilities(self, logits: Tensor | np.ndarray) -> Tensor:
        return (self._logits(logits) / float(self.temperature_)).softmax(1)


class VectorScaling(Calibrator):
    """softmax(a * z + b), a scale and a bias for each class, of least NLL: predictions may change.

    Minimised in float64 by L-BFGS: mean NLL + l2 / 2 (|a T - 1|^2 + |b|^2), T the temperature, so that a class of which
    the held-out data say nothing keeps the temperature's scale. Strictly convex for l2 > 0. Learnt: `scale_` a and
    `bias_` b, (K,). RuntimeWarning where the optimum is not reached. Memory: some N K float64. Source: Guo et al. 2017
    (arXiv 1706.04599), section 4.2, who have no penalty.

    Args:
        l2: weight of the penalty; 0 is the paper's.
    """

    _learnt = ("scale", "bias")

    def __init__(self, l2: float = 1e-4) -> None:
        if not l2 >= 0.0:
            raise ValueError(f"l2 must be at least 0, got {l2}")
        self.l2 = l2

    def fit(self, logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> VectorScaling:
        z, y = self._training(logits, labels)
        temperature = fit_temperature(z, y)
        z = z / temperature  # the solution is near a = 1, b = 0
        a, b = torch.ones(self.classes_, dtype=z.dtype), torch.zeros(self.classes_, dtype=z.dtype)
        parameters = [a.requires_grad_(), b.requires_grad_()]
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(a * z + b, y) + self.l2 / 2 * ((a - 1.0).square().sum() + b.square().sum())
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
            objective()
        slope = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
        if slope > 1e-5:
            warnings.warn(
                f"vector scaling stopped at a gradient of {slope:.1g}, short of its optimum: take a larger l2",
                RuntimeWarning,
                stacklevel=2,
            )
        self.scale_, self.bias_ = a.detach() / temperature, b.detach()
        return self

    def _check_learnt(self) -> None:
        if not self.scale_.shape == self.bias_.shape == (self.classes_,):
            raise ValueError(f"scale and bias must be ({self.classes_},), one number for each class")

    def probabilities(self, logits: Tensor | np.ndarray) -> Tensor:
        z = self._logits(logits)
        return (self.scale_.to(z.device) * z + self.bias_.to(z.device)).softmax(1)


class IsotonicCalibration(Calibrator):
    """One increasing function of all class probabilities, then normalised: keeps every prediction.

    f is the isotonic regression (scikit-learn's) of [k = y_i] on p_ik over all N K pairs; between its steps it is
    linear. 1e-6 p is added to it, so that what f makes equal stays in its order. Learnt: the steps, `inputs_` and
    `outputs_`. Memory: some N K float64. Source: the multi-class form of Zhang et al. 2020 (Mix-n-Match, arXiv
    2003.07329), whose code adds 1e-9 p and leaves rows that do not sum to 1.
    """

    _learnt = ("inputs", "outputs")

    def fit(self, logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> IsotonicCalibration:
        from sklearn.isotonic import IsotonicRegression

        z, y = self._training(logits, labels)
        hits = F.one_hot(y, self.classes_).double()
        f = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        f.fit(z.softmax(1).numpy().ravel(), hits.numpy().ravel())
        self.inputs_, self.outputs_ = (torch.from_numpy(steps) for steps in (f.X_thresholds_, f.y_thresholds_))
        return self

    def _check_learnt(self) -> None:
        _check_steps(inputs=self.inputs_, outputs=self.outputs_)
        if bool((self.outputs_.diff() < 0.0).any()):
            raise ValueError("outputs must not decrease")

    def probabilities(self, logits: Tensor | np.ndarray) -> Tensor:
        p = self._logits(logits).softmax(1)
        f = torch.from_numpy(np.interp(p.cpu().numpy(), self.inputs_.numpy(), self.outputs_.numpy())).to(p.device)
        f = f + 1e-6 * p
        return f / f.sum(1, keepdim=True)


class HistogramBinning(Calibrator):
    """Confidence becomes the held-out accuracy of its bin; the other classes share the rest as they did before.

    Bins of equal mass, as those of `calibration_report(scheme="mass")`. A prediction changes only where the accuracy of
    its bin is less than what the runner-up then gets. A bin without errors says 1, which costs NLL dearly when it is
    wrong: have enough samples a bin. Learnt: the bins' `upper_` ends and `accuracy_`. Source: Zadrozny
    and Elkan 2001, on the top label as Gupta and Ramdas 2022 (arXiv 2107.08353) argue; the one-vs-rest form of Guo et
    al. takes B numbers for each class, and changes predictions.

    Args:
        bins: B, at most; samples of equal confidence share one.
    """

    _learnt = ("upper", "accuracy")

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.bins = bins

    def fit(self, logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> HistogramBinning:
        z, y = self._training(logits, labels)
        table = calibration_report(z.softmax(1), y, self.bins, "mass").bins
        self.upper_, self.accuracy_ = (
            torch.tensor([getattr(row, name) for row in table], dtype=torch.float64) for name in ("upper", "accuracy")
        )
        return self

    def _check_learnt(self) -> None:
        _check_steps(upper=self.upper_, accuracy=self.accuracy_)

    def probabilities(self, logits: Tensor | np.ndarray) -> Tensor:
        p = self._logits(logits).softmax(1)
        if self.classes_ == 1:
            return p
        confidence, top = p.max(1, keepdim=True)
        calibrated = self.accuracy_.to(p.device)[torch.bucketize(confidence, self.upper_[:-1].to(p.device))]
        others = p.scatter(1, top, 0.0)
        rest = others.sum(1, keepdim=True)
        even = torch.full_like(p, 1.0 / (self.classes_ - 1))  # where the softmax left nothing to share
        shares = torch.where(rest > 0.0, others / torch.where(rest > 0.0, rest, 1.0), even)
        # Of NaN there is a last bin and an even share: what is no distribution must not become one.
        return ((1.0 - calibrated) * shares).scatter(1, top, calibrated).masked_fill(p.isnan(), torch.nan)


def _check_steps(**steps: Tensor) -> None:
    """ValueError unless these are two rows of one length in [0, 1], the first of which increases."""
    (first, x), (second, y) = steps.items()
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"{first} and {second} must be of one length, are {tuple(x.shape)} and {tuple(y.shape)}")
    for name, values in steps.items():
        if not bool(((values >= 0.0) & (values <= 1.0)).all()):
            raise ValueError(f"{name} must be between 0 and 1")
    if bool((x.diff() < 0.0).any()):
        raise ValueError(f"{first} must not decrease")


def load(path: str | Path) -> Calibrator:
    """The calibrator that `save` wrote, bit for bit, from a file or a directory.

    ValueError for a damaged file or one of another kind, FileNotFoundError for none.
    """
    path = place(path, CALIBRATOR_FILE)
    settings, learnt = load_fitted(path, "Calibrator")
    with refusing(path, "Calibrator"):
        if settings["type"] not in Calibrator.kinds:
            known = sorted(Calibrator.kinds)
            raise ValueError(f"it holds a {settings['type']!r:.80}; known are {known}: import its class first")
        calibrator = Calibrator.kinds[settings["type"]](**settings["options"])
        if learnt.keys() != set(calibrator._learnt):
            raise ValueError(f"it holds {sorted(learnt)}, expected {sorted(calibrator._learnt)}")
        for name, value in learnt.items():
            if value.dtype != torch.float64 or not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite numbers in float64")
            setattr(calibrator, f"{name}_", value)
        calibrator.classes_ = settings["classes"]
        if type(calibrator.classes_) is not int or calibrator.classes_ < 1:
            raise ValueError(f"classes must be a number of classes, got {calibrator.classes_!r:.80}")
        calibrator._check_learnt()
    return calibrator
