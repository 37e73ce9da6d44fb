"""OSE: the output-space ensemble of a zero-shot and a fine-tuned classifier.

    p(y | x) = (1 - a) softmax(z_zs / T_zs) + a softmax(z_ft / T_ft)

T = 1, or each model's own temperature from held-out ID data: without it the more confident model, usually the
fine-tuned one, has the louder voice. T is the temperature at which mean confidence equals accuracy (VRF's rule), not
the one of lowest NLL: on validation data that a model gets all right that one falls to zero, and with it the ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from robustft.calibration import temperature_matching_confidence
from robustft.methods.base import Outputs, Predictor
from robustft.methods.wise_ft import ALPHAS, accuracy_and_nll, best_alpha, check_alpha, check_classes


class OutputEnsemble:
    """Mixture of two classifiers' probabilities; two forward passes an image.

    Learnt by `fit`: `alpha_`, `temperatures_` (zero-shot, fine-tuned), and over `alphas_` the `accuracies_`
    and `nlls_` on the validation set. Source: Wortsman et al. (arXiv 2109.01903), which uses no temperature;
    Zhu et al. (VRF, arXiv 2411.06966) calibrates its own ensemble but not the one that it compares with: fit
    both.

    Args:
        zero_shot, fine_tuned: classifiers over the same classes.
        temperatures: None for (1, 1), "fit" to fit each on the validation set, or a pair that divides the
            logits.
    """

    def __init__(
        self,
        zero_shot: Predictor,
        fine_tuned: Predictor,
        temperatures: Literal["fit"] | tuple[float, float] | None = None,
    ) -> None:
        check_classes(zero_shot, fine_tuned)
        if isinstance(temperatures, str) and temperatures != "fit":
            raise ValueError(f'temperatures must be None, "fit" or a pair, got {temperatures!r}')
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned
        self.temperatures = temperatures
        if temperatures != "fit":
            self.temperatures_ = (1.0, 1.0) if temperatures is None else _positive(temperatures)

    def at(self, alpha: float) -> Mixture:
        """The predictor at mixing weight alpha: 0 is the zero-shot one, 1 the fine-tuned one."""
        if not hasattr(self, "temperatures_"):
            raise ValueError('OutputEnsemble(temperatures="fit") has no temperatures yet: call fit(validation)')
        return Mixture(self.zero_shot, self.fine_tuned, alpha, self.temperatures_)

    def fit(self, validation: Any, alphas: Sequence[float] = ALPHAS) -> OutputEnsemble:
        """Choose temperatures (if asked to), then alpha_, by accuracy on held-out ID data, then by NLL."""
        zs, labels = self.zero_shot.predict(validation)
        ft, _ = self.fine_tuned.predict(validation)
        if self.temperatures == "fit":
            self.temperatures_ = tuple(temperature_matching_confidence(o.logits, labels) for o in (zs, ft))
        scores = [
            accuracy_and_nll(mixture_log_probabilities(zs.logits, ft.logits, a, self.temperatures_), labels)
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


class Mixture(Predictor):
    """The mixture at one alpha: log-probabilities as logits, cosines mixed alike, fine-tuned features."""

    def __init__(
        self,
        zero_shot: Predictor,
        fine_tuned: Predictor,
        alpha: float,
        temperatures: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        check_alpha(alpha)
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned
        self.classes = fine_tuned.classes
        self.alpha = alpha
        self.temperatures = _positive(temperatures)

    def outputs(self, images: Tensor) -> Outputs:
        zs, ft = self.zero_shot.outputs(images), self.fine_tuned.outputs(images)
        return Outputs(
            ft.features,
            torch.lerp(zs.cosines, ft.cosines, self.alpha),
            mixture_log_probabilities(zs.logits, ft.logits, self.alpha, self.temperatures),
        )

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> Mixture:
        """Each member restricted before its own softmax, then mixed."""
        return Mixture(
            self.zero_shot.restrict(classes), self.fine_tuned.restrict(classes), self.alpha, self.temperatures
        )


def mixture_log_probabilities(
    zero_shot: Tensor, fine_tuned: Tensor, alpha: float, temperatures: tuple[float, float]
) -> Tensor:
    """log[(1 - a) softmax(z_zs / T_zs) + a softmax(z_ft / T_ft)], (N, K), without leaving log space."""
    t_zs, t_ft = temperatures
    log_zs, log_ft = (zero_shot / t_zs).log_softmax(-1), (fine_tuned / t_ft).log_softmax(-1)
    if alpha in (0.0, 1.0):
        return log_ft if alpha else log_zs
    return torch.logaddexp(log_zs + math.log1p(-alpha), log_ft + math.log(alpha))


def _positive(temperatures: tuple[float, float]) -> tuple[float, float]:
    t_zs, t_ft = temperatures
    if not (0.0 < t_zs < math.inf and 0.0 < t_ft < math.inf):
        raise ValueError(f"temperatures must be positive and finite, got {temperatures}")
    return t_zs, t_ft
