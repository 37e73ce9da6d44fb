"""OSE: the output-space ensemble of a zero-shot and a fine-tuned classifier.

    p(y | x) = (1 - a) softmax(z_zs / T_zs) + a softmax(z_ft / T_ft)

T = 1, or each model's own temperature from held-out ID data: without it the more confident model, usually the
fine-tuned one, has the louder voice. T is the temperature at which mean confidence equals accuracy (VRF's rule), or
the one of lowest NLL: on validation data that a model gets all right the latter falls to zero, and with it the
ensemble, so it is refused there.

Two classifiers with one encoder, such as a linear probe and the zero-shot head on its tower, take one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from robustft.calibration.measures import fit_temperature, temperature_matching_confidence
from robustft.clip.outputs import Outputs
from robustft.ensembles.composite import Composite
from robustft.ensembles.wise_ft import ALPHAS, best_alpha, check_alpha, check_alphas, check_members
from robustft.ops.kinds import checked, described
from robustft.predictors.base import Predictor, outputs_of_each, predict_each
from robustft.predictors.logits import accuracy_and_nll, mixture_log_probabilities

TemperatureRule = Literal["confidence", "nll"]

TEMPERATURE_RULES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "confidence": temperature_matching_confidence,
    "nll": fit_temperature,
}


class OutputEnsemble:
    """Mixture of two classifiers' probabilities; two forward passes an image, or one where the encoder is shared.

    Learnt by `fit`: `alpha_`, `temperatures_` (zero-shot, fine-tuned), and over `alphas_` the `accuracies_`
    and `nlls_` on the validation set. Source: Wortsman et al. (arXiv 2109.01903), which uses no temperature;
    Zhu et al. (VRF, arXiv 2411.06966) calibrates its own ensemble but not the one that it compares with: fit
    both.

    Args:
        zero_shot, fine_tuned: classifiers over the same classes.
        temperatures: None for (1, 1), a pair that divides the logits, or how to fit each on the validation set:
            "confidence", mean confidence equal to accuracy ("fit" is the same), or "nll", the lowest NLL.
    """

    @checked
    def __init__(
        self,
        zero_shot: Predictor,
        fine_tuned: Predictor,
        temperatures: Literal["fit"] | TemperatureRule | tuple[float, float] | None = None,
    ) -> None:
        check_members(zero_shot, fine_tuned)
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned
        self.temperatures = "confidence" if temperatures == "fit" else check_temperatures(temperatures)
        if not isinstance(self.temperatures, str):
            self.temperatures_: tuple[float, float] = self.temperatures

    @checked
    def at(self, alpha: float) -> Mixture:
        """The predictor at mixing weight alpha: 0 is the zero-shot one, 1 the fine-tuned one."""
        if not hasattr(self, "temperatures_"):
            raise ValueError(
                f'OutputEnsemble(temperatures="{self.temperatures}") has no temperatures yet: call fit(validation)'
            )
        return Mixture(self.zero_shot, self.fine_tuned, alpha, self.temperatures_)

    @checked
    def fit(self, validation: Any, alphas: Sequence[float] = ALPHAS) -> OutputEnsemble:
        """Choose temperatures (if asked to), then alpha_, by accuracy on held-out ID data, then by NLL."""
        check_alphas(alphas)
        zs, ft = predict_each((self.zero_shot, self.fine_tuned), validation)
        self.temperatures_ = fitted_temperatures(self.temperatures, zs.logits, ft.logits, ft.labels)
        scores = [
            accuracy_and_nll(mixture_log_probabilities(zs.logits, ft.logits, a, self.temperatures_), ft.labels)
            for a in alphas
        ]
        self.alphas_ = tuple(alphas)
        self.accuracies_, self.nlls_ = (tuple(column) for column in zip(*scores, strict=True))
        self.alpha_ = best_alpha(self.alphas_, self.accuracies_, self.nlls_)
        return self

    def classifier(self) -> Mixture:
        """The predictor at the chosen alpha_."""
        if not hasattr(self, "alpha_"):
            raise ValueError("OutputEnsemble has no alpha yet: call fit(validation), or at(alpha)")
        return self.at(self.alpha_)


class PairPredictor(Composite):
    """Two predictors over the same classes and a way to `combine` what they make of the same images."""

    members = ("zero_shot", "fine_tuned")
    zero_shot: Predictor
    fine_tuned: Predictor

    @checked
    def __init__(self, zero_shot: Predictor, fine_tuned: Predictor) -> None:
        super().__init__()
        check_members(zero_shot, fine_tuned)
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned
        self.classes = fine_tuned.classes

    def combine(self, zero_shot: Outputs, fine_tuned: Outputs) -> Outputs:
        """The pair's outputs from its members': to vary how they are mixed without encoding again."""
        raise NotImplementedError

    @property
    def joined(self) -> tuple[Predictor, ...]:
        return self.zero_shot, self.fine_tuned

    def combined(self, outputs: Sequence[Outputs]) -> Outputs:
        return self.combine(*outputs)

    def outputs(self, images: Tensor) -> Outputs:
        (outputs,) = outputs_of_each((self,), images)
        return outputs


class Mixture(PairPredictor):
    """The mixture at one alpha: log-probabilities as logits, cosines mixed alike, fine-tuned features."""

    settings = ("alpha", "temperatures")

    @checked
    def __init__(
        self,
        zero_shot: Predictor,
        fine_tuned: Predictor,
        alpha: float,
        temperatures: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(zero_shot, fine_tuned)
        check_alpha(alpha)
        self.alpha = alpha
        self.temperatures = check_pair(temperatures)

    def combine(self, zero_shot: Outputs, fine_tuned: Outputs) -> Outputs:
        return mix(zero_shot, fine_tuned, self.alpha, self.temperatures)

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> Mixture:
        """Each member restricted before its own softmax, then mixed."""
        return Mixture(
            self.zero_shot.restrict(classes), self.fine_tuned.restrict(classes), self.alpha, self.temperatures
        )


def mix(zero_shot: Outputs, fine_tuned: Outputs, alpha: float | Tensor, temperatures: tuple[float, float]) -> Outputs:
    """The mixture's outputs at alpha, a number or one for each sample (N,); the rest is the fine-tuned one's."""
    share = alpha.to(fine_tuned.cosines)[:, None] if isinstance(alpha, Tensor) else alpha
    return fine_tuned.replace(
        cosines=torch.lerp(zero_shot.cosines, fine_tuned.cosines, share),
        logits=mixture_log_probabilities(zero_shot.logits, fine_tuned.logits, alpha, temperatures),
    )


def check_temperatures(temperatures: Any) -> str | tuple[float, float]:
    """A rule's name or a pair of numbers, (1, 1) for None; ValueError for anything else."""
    if temperatures is None:
        return 1.0, 1.0
    if isinstance(temperatures, str):
        if temperatures not in TEMPERATURE_RULES:
            raise ValueError(
                f"temperatures must be None, {' or '.join(map(repr, TEMPERATURE_RULES))}, or a pair of numbers, "
                f"got {temperatures!r}"
            )
        return temperatures
    return check_pair(temperatures)


def fitted_temperatures(
    rule: str | tuple[float, float], zero_shot: Tensor, fine_tuned: Tensor, labels: Tensor
) -> tuple[float, float]:
    """(T_zs, T_ft) of logits (N, K) by a rule's name; a pair is given back."""
    if not isinstance(rule, str):
        return rule
    for name, logits in (("zero-shot", zero_shot), ("fine-tuned", fine_tuned)):
        if rule == "nll" and bool((logits.argmax(-1) == labels).all()):
            raise ValueError(
                f"the {name} classifier is right on all {len(labels)} validation samples, so NLL falls until its "
                'temperature is 0: use temperatures="confidence", a pair of numbers, or more validation data'
            )
    fit = TEMPERATURE_RULES[rule]
    return fit(zero_shot, labels), fit(fine_tuned, labels)


def check_pair(temperatures: Any) -> tuple[float, float]:
    """Temperatures (T_zs, T_ft); ValueError unless both are positive and finite."""
    pair = isinstance(temperatures, Sequence) and not isinstance(temperatures, str) and len(temperatures) == 2
    if not pair or not all(isinstance(t, Real) for t in temperatures):
        raise ValueError(f"temperatures must be a pair of numbers, got {described(temperatures)}")
    t_zs, t_ft = temperatures
    if not (0.0 < t_zs < math.inf and 0.0 < t_ft < math.inf):
        raise ValueError(f"temperatures must be positive and finite, got {temperatures}")
    return t_zs, t_ft
