"""WiSE-FT: robust fine-tuning of zero-shot models (Wortsman et al., CVPR 2022, arXiv 2109.01903).

    theta(a) = (1 - a) theta_zs + a theta_ft       all weights: towers and scale
    W(a)     = (1 - a) s_zs w_zs + a s_ft w_ft     the head, a linear map with its scale inside

a is chosen by accuracy on held-out in-distribution data, never on a test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.encoding import image_tower
from robustft.clip.outputs import Outputs
from robustft.data.sources import stated_by
from robustft.ops.kinds import checked
from robustft.predictors.base import Classifier, Predictor, predict_each
from robustft.predictors.logits import accuracy_and_nll, preference

ALPHAS = tuple(i / 10 for i in range(11))


class WiSEFT:
    """Weight-space ensemble of a zero-shot and a fine-tuned classifier.

    The head is interpolated with the weights, as the released code does (also for text-derived heads), rather
    than rebuilt from the interpolated text tower. Adapters are merged into the weights first.

    Learnt by `fit`: `alpha_`, and over `alphas_` the `accuracies_` and `nlls_` on the validation set.

    Args:
        zero_shot, fine_tuned: classifiers of one architecture over the same classes.

    Source: Wortsman et al., WiSE-FT (CVPR 2022, arXiv 2109.01903), and its released code.
    """

    def __init__(self, zero_shot: Classifier, fine_tuned: Classifier) -> None:
        check_classifiers(zero_shot, fine_tuned)
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned

    @checked
    def at(self, alpha: float) -> Classifier:
        """The classifier at alpha, 0 for zero-shot and 1 for fine-tuned, with its own copy of the model."""
        check_alpha(alpha)
        model = clip.interpolate(self.zero_shot.model, self.fine_tuned.model, alpha)
        return Classifier(model, classes=self.zero_shot.classes, **self._head(alpha))

    def _head(self, alpha: float) -> dict[str, Any]:
        return mixed_head(self.zero_shot, self.fine_tuned, alpha)

    def along(self, alphas: Sequence[float]) -> tuple[Predictor, ...]:
        """Predictors at several alphas for reading a set once: they share one model, whose weights each makes its own
        before it looks at a batch. Memory: one copy of the model. For `predict_each`, and not to be kept."""
        for alpha in alphas:
            check_alpha(alpha)
        walk = Walk(self.zero_shot.model, self.fine_tuned.model, clip.interpolate_state)
        return tuple(walk.at(alpha, self.zero_shot.classes, self._head(alpha)) for alpha in alphas)

    @checked
    def fit(self, validation: Any, alphas: Sequence[float] = ALPHAS) -> WiSEFT:
        """Choose alpha_ by accuracy on held-out ID data, (images, labels) or a dataset; of equals by NLL.

        The data are read once. Memory: a copy of the model, and the logits at all alphas.
        """
        check_alphas(alphas)
        outputs = predict_each(self.along(alphas), validation, parts=("logits", "labels"))
        scores = [accuracy_and_nll(found.logits, found.labels) for found in outputs]
        self.alphas_ = tuple(alphas)
        self.accuracies_, self.nlls_ = (tuple(column) for column in zip(*scores, strict=True))
        self.alpha_ = best_alpha(self.alphas_, self.accuracies_, self.nlls_)
        return self

    def classifier(self) -> Classifier:
        """The classifier at the chosen alpha_."""
        if not hasattr(self, "alpha_"):
            raise ValueError("WiSEFT has no alpha yet: call fit(validation), or at(alpha)")
        return self.at(self.alpha_)


def mixed_head(zero_shot: Classifier, fine_tuned: Classifier, alpha: float) -> dict[str, Any]:
    """(1 - alpha) s_zs w_zs + alpha s_ft w_ft, in the parts that a Classifier takes."""
    zs, ft = zero_shot, fine_tuned
    mix = _mix(alpha)
    scale = mix(zs.logit_scale, ft.logit_scale)
    head = mix(zs.logit_scale * zs.class_embeddings, ft.logit_scale * ft.class_embeddings)
    bias = None
    if zs.bias is not None or ft.bias is not None:
        zero = head.new_zeros(len(head))
        bias = mix(zero if zs.bias is None else zs.bias, zero if ft.bias is None else ft.bias)
    return {"class_embeddings": head / scale, "logit_scale": scale, "bias": bias}


class Walk:
    """One model on its way between two: `to(place)` gives its image tower the weights `state_at(zero_shot, fine_tuned,
    place)`, and `whole_at(place)` all of it."""

    def __init__(self, zero_shot: nn.Module, fine_tuned: nn.Module, state_at: Callable[..., dict[str, Tensor]]) -> None:
        zero_shot, fine_tuned = clip.merged(zero_shot), clip.merged(fine_tuned)
        self.ends = zero_shot.state_dict(), fine_tuned.state_dict()
        self.model, self.state_at = clip.interpolate(zero_shot, fine_tuned, 1.0), state_at
        tower = image_tower(self.model)
        prefix = next(name for name, module in self.model.named_modules() if module is tower) + "."
        zs, ft = ({k: v for k, v in end.items() if k.startswith(prefix)} for end in self.ends)
        self.tower_ends = zs, ft
        self.place: Any = None

    def to(self, place: Any) -> None:
        if place != self.place:
            self.model.load_state_dict(self.state_at(*self.tower_ends, place), strict=False)
            self.place = place

    def whole_at(self, place: Any) -> nn.Module:
        """The model itself, which is to stay there."""
        self.model.load_state_dict(self.state_at(*self.ends, place))
        return self.model

    def at(self, place: Any, classes: Sequence[str], head: dict[str, Any]) -> Predictor:
        """The classifier there, of the model that all places share."""
        return _Point(self.model, classes=classes, walk=self, place=place, **head)


class _Point(Classifier):
    """The classifier at one place, of a model that is elsewhere in between."""

    def __init__(self, model: nn.Module, *, walk: Walk, place: Any, **parts: Any) -> None:
        super().__init__(model, **parts)
        self.walk, self.place = walk, place

    @property
    def encoder(self) -> None:
        """None: the features of one place are not another's."""
        return None

    def outputs(self, images: Tensor) -> Outputs:
        self.walk.to(self.place)
        return super().outputs(images)

    def _with(self, classes: Sequence[str], **changed: Tensor) -> _Point:
        return _Point(self.model, classes=classes, walk=self.walk, place=self.place, **self._held() | changed)


def check_classifiers(zero_shot: Any, fine_tuned: Any) -> None:
    """TypeError for what has no weights and head to interpolate; otherwise as `check_members`."""
    for name, value in (("zero_shot", zero_shot), ("fine_tuned", fine_tuned)):
        if not isinstance(value, Classifier):
            raise TypeError(
                f"{name} must be a Classifier, weights and a head to interpolate, got {type(value).__name__}; "
                "OutputEnsemble mixes the probabilities of any two predictors"
            )
    check_members(zero_shot, fine_tuned)


def check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")


def check_alphas(alphas: Sequence[float]) -> None:
    if not len(alphas) or not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise ValueError(f"alphas must be numbers in [0, 1], at least one, got {alphas!r:.80}")


def check_members(zero_shot: Any, fine_tuned: Any) -> None:
    """ValueError for members over other classes, and for those of images normalised in two ways: both see the same."""
    statistics = [stated_by(member) for member in (zero_shot, fine_tuned)]
    if None not in statistics and statistics[0] != statistics[1]:
        raise ValueError(
            "zero_shot and fine_tuned are of images normalised by other means and standard deviations, "
            f"{statistics[0]} and {statistics[1]}: one set of images cannot be shown to both"
        )
    if zero_shot.classes != fine_tuned.classes:
        differing = [c for c in zero_shot.classes if c not in fine_tuned.classes]
        raise ValueError(
            f"zero_shot and fine_tuned must have the same classes in the same order, got "
            f"{len(zero_shot.classes)} and {len(fine_tuned.classes)}"
            + (f"; fine_tuned lacks {differing[:5]}" if differing else "")
        )


def best_alpha(alphas: Sequence[float], accuracies: Sequence[float], nlls: Sequence[float]) -> float:
    """The alpha of highest accuracy; of equals the one of lower NLL, then the first."""
    return min(zip(alphas, accuracies, nlls, strict=True), key=lambda row: preference(*row[1:]))[0]


def _mix(alpha: float):
    # torch.lerp rounds so that both ends come out exactly
    return lambda zs, ft: torch.lerp(zs, ft.to(zs), alpha)
