"""WiSE-FT: robust fine-tuning of zero-shot models (Wortsman et al., CVPR 2022, arXiv 2109.01903).

    theta(a) = (1 - a) theta_zs + a theta_ft       all weights: towers and scale
    W(a)     = (1 - a) s_zs w_zs + a s_ft w_ft     the head, a linear map with its scale inside

a is chosen by accuracy on held-out in-distribution data, never on a test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from robustft import clip
from robustft.predictors.base import Classifier
from robustft.predictors.logits import accuracy_and_nll

ALPHAS = tuple(i / 10 for i in range(11))


class WiSEFT:
    """Weight-space ensemble of a zero-shot and a fine-tuned classifier.

    The head is interpolated with the weights, as the released code does (also for text-derived heads), rather
    than rebuilt from the interpolated text tower.

    Learnt by `fit`: `alpha_`, and over `alphas_` the `accuracies_` and `nlls_` on the validation set.

    Args:
        zero_shot, fine_tuned: classifiers of one architecture over the same classes.

    Source: Wortsman et al., WiSE-FT (CVPR 2022, arXiv 2109.01903), and its released code.
    """

    def __init__(self, zero_shot: Classifier, fine_tuned: Classifier) -> None:
        for name, value in (("zero_shot", zero_shot), ("fine_tuned", fine_tuned)):
            if not isinstance(value, Classifier):
                raise TypeError(
                    f"{name} must be a Classifier, weights and a head to interpolate, got {type(value).__name__}; "
                    "OutputEnsemble mixes the probabilities of any two predictors"
                )
        check_classes(zero_shot, fine_tuned)
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned

    def at(self, alpha: float) -> Classifier:
        """The classifier at alpha, 0 for zero-shot and 1 for fine-tuned, with its own copy of the model."""
        check_alpha(alpha)
        zs, ft = self.zero_shot, self.fine_tuned
        mix = _mix(alpha)
        scale = mix(zs.logit_scale, ft.logit_scale)
        head = mix(zs.logit_scale * zs.class_embeddings, ft.logit_scale * ft.class_embeddings)
        bias = None
        if zs.bias is not None or ft.bias is not None:
            zero = head.new_zeros(len(head))
            bias = mix(zero if zs.bias is None else zs.bias, zero if ft.bias is None else ft.bias)
        model = clip.interpolate(zs.model, ft.model, alpha)
        return Classifier(model, head / scale, zs.classes, logit_scale=scale, bias=bias)

    def fit(self, validation: Any, alphas: Sequence[float] = ALPHAS) -> WiSEFT:
        """Choose alpha_ by accuracy on held-out ID data, (images, labels) or a dataset; of equals by NLL."""
        scores = []
        for alpha in alphas:
            outputs = self.at(alpha).predict(validation)
            scores.append(accuracy_and_nll(outputs.logits, outputs.labels))
        self.alphas_ = tuple(alphas)
        self.accuracies_, self.nlls_ = (tuple(column) for column in zip(*scores, strict=True))
        self.alpha_ = best_alpha(self.alphas_, self.accuracies_, self.nlls_)
        return self

    def classifier(self) -> Classifier:
        """The classifier at the chosen alpha_."""
        if not hasattr(self, "alpha_"):
            raise ValueError("WiSEFT has no alpha yet: call fit(validation), or at(alpha)")
        return self.at(self.alpha_)


def check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")


def check_classes(zero_shot: Any, fine_tuned: Any) -> None:
    if zero_shot.classes != fine_tuned.classes:
        differing = [c for c in zero_shot.classes if c not in fine_tuned.classes]
        raise ValueError(
            f"zero_shot and fine_tuned must have the same classes in the same order, got "
            f"{len(zero_shot.classes)} and {len(fine_tuned.classes)}"
            + (f"; fine_tuned lacks {differing[:5]}" if differing else "")
        )


def best_alpha(alphas: Sequence[float], accuracies: Sequence[float], nlls: Sequence[float]) -> float:
    """The alpha of highest accuracy; of equals the one of lower NLL, then the first."""
    if not alphas:
        raise ValueError("alphas is empty")
    return min(zip(alphas, accuracies, nlls, strict=True), key=lambda row: (-row[1], row[2]))[0]


def _mix(alpha: float):
    # torch.lerp rounds so that both ends come out exactly
    return lambda zs, ft: torch.lerp(zs, ft.to(zs), alpha)
