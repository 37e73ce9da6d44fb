"""LiNeS: the update of a fine-tuning scaled by depth (Wang et al., ICLR 2025, arXiv 2410.17146).

    theta_l = theta_zs,l + lambda_l (theta_ft,l - theta_zs,l)       l = 1 .. L, the block that a weight stands in
    lambda_l = alpha + beta (l - 1) / (L - 1)

Shallow layers hold what was learnt before and deep ones what the task asks for: a smaller update of the shallow ones
gives the zero-shot model's robustness back. beta = 0 is WiSE-FT at alpha. Both are chosen on held-out ID data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from robustft import clip
from robustft.ensembles.wise_ft import Walk, check_alpha, check_alphas, check_classifiers, mixed_head
from robustft.ops.kinds import checked
from robustft.predictors.base import Classifier, predict_each
from robustft.predictors.logits import accuracy_and_nll, preference

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the first block and of the last, from which `fit` takes the best pair."""


class LiNeS:
    """A fine-tuned classifier whose update grows linearly with depth, from alpha in the first block of each tower to
    alpha + beta in the last.

    The head, the scale and what stands after the blocks take the last block's share; `clip.depths` says which block a
    weight counts to.

    Learnt by `fit`: `alpha_` and `beta_`, and over `pairs_` the `accuracies_` and `nlls_` on the validation set.

    Args:
        zero_shot, fine_tuned: classifiers of one architecture over the same classes; a soup of fine-tunings, too.

    Source: Wang et al., LiNeS (ICLR 2025, arXiv 2410.17146), section 3.
    """

    def __init__(self, zero_shot: Classifier, fine_tuned: Classifier) -> None:
        check_classifiers(zero_shot, fine_tuned)
        self.zero_shot = zero_shot
        self.fine_tuned = fine_tuned
        self._shares = {name: depth.share for name, depth in clip.depths(clip.merged(zero_shot.model)).items()}

    @checked
    def at(self, alpha: float, beta: float) -> Classifier:
        """The classifier with the updates of first blocks scaled by alpha and of last ones by alpha + beta, both in
        [0, 1], with its own copy of the model."""
        _check_pair(alpha, beta)
        model = self._walk().whole_at((alpha, beta))
        return Classifier(model, classes=self.zero_shot.classes, **self._head(alpha, beta))

    @checked
    def fit(self, validation: Any, scales: Sequence[float] = SCALES) -> LiNeS:
        """Choose alpha_ and beta_ by accuracy on held-out ID data, (images, labels) or a dataset; of equals by NLL.

        scales: of the first block, and of the last one, which is no smaller. The data are read once. Memory: a copy of
        the model, and the logits of all pairs.
        """
        check_alphas(scales)
        pairs = [(first, last - first) for first in sorted(scales) for last in sorted(scales) if last >= first]
        walk, classes = self._walk(), self.zero_shot.classes
        points = [walk.at(pair, classes, self._head(*pair)) for pair in pairs]
        outputs = predict_each(points, validation, parts=("logits", "labels"))
        scores = [accuracy_and_nll(found.logits, found.labels) for found in outputs]
        self.pairs_ = tuple(pairs)
        self.accuracies_, self.nlls_ = (tuple(column) for column in zip(*scores, strict=True))
        best = min(range(len(pairs)), key=lambda i: preference(*scores[i]))
        self.alpha_, self.beta_ = pairs[best]
        return self

    def classifier(self) -> Classifier:
        """The classifier at the chosen alpha_ and beta_."""
        if not hasattr(self, "alpha_"):
            raise ValueError("LiNeS has no alpha and beta yet: call fit(validation), or at(alpha, beta)")
        return self.at(self.alpha_, self.beta_)

    def _head(self, alpha: float, beta: float) -> dict[str, Any]:
        return mixed_head(self.zero_shot, self.fine_tuned, min(1.0, alpha + beta))

    def _walk(self) -> Walk:
        def state(
            zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], pair: tuple[float, float]
        ) -> dict[str, Tensor]:
            alpha, beta = pair
            return clip.interpolate_entries(
                zero_shot, fine_tuned, {name: min(1.0, alpha + beta * self._shares[name]) for name in fine_tuned}
            )

        return Walk(self.zero_shot.model, self.fine_tuned.model, state)


def _check_pair(alpha: float, beta: float) -> None:
    check_alpha(alpha)
    if not 0.0 <= beta or not alpha + beta <= 1.0 + 1e-9:
        raise ValueError(f"beta must be at least 0 and alpha + beta at most 1, got alpha {alpha} and beta {beta}")
