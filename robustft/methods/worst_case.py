"""Fine-tuning for the worst samples or groups instead of the average.

l (N,) losses of a batch, g (N,) their groups in [0, G), R_g the mean loss of group g

WorstGroup    max_g R_g
GroupDRO      sum_g q_g R_g,   q_g <- q_g exp(eta R_g), normalised, at every step       (arXiv 1911.08731)
CVaR          mean of the worst fraction alpha of the losses, whatever their groups     (arXiv 2010.05893)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.functional import cvar, group_dro, group_risk
from robustft.methods.base import Step
from robustft.methods.fine_tune import FineTune, FineTuneOptions
from robustft.methods.options import Configured, check_weights
from robustft.ops.arguments import check_count


class Risk(Configured, nn.Module):
    """What per-sample losses (N,) become, a 0-d tensor; its state, if any, moves in `after_step`.

    `forward` gets groups (N,) where the batch has them. A resumed run must find the same options.
    """

    def forward(self, losses: Tensor, groups: Tensor | None) -> Tensor:
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after every optimiser step."""

    def _given(self, groups: Tensor | None) -> Tensor:
        if groups is None:
            raise ValueError(f'{type(self).__name__} needs batches with "group", (N,) integers')
        return groups


class WorstGroup(Risk):
    """The largest mean loss of a group in the batch; only that group gets a gradient.

    Groups that the batch lacks are never the worst, so a batch should hold many samples of each.
    """

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = _at_least_one(num_groups)

    def forward(self, losses: Tensor, groups: Tensor | None) -> Tensor:
        return group_risk(losses, self._given(groups), self.num_groups).worst


class GroupDRO(Risk):
    """Group distributionally robust optimisation (Sagawa et al. 2020, arXiv 1911.08731, algorithm 1).

    The weights `weights` (G,) start equal, follow the batch's losses before they weigh them, and are kept by
    `after_step`: they are state, and resumed with the run. A group that a batch lacks counts as of risk 0, as in the
    authors' code. The paper draws all groups equally often, and decays weights strongly or stops early: a model that
    fits its whole training set has no bad group left to learn from.

    Args:
        num_groups: G. step_size: eta; 0.01 in the paper.
    """

    weights: Tensor

    def __init__(self, num_groups: int, step_size: float = 0.01) -> None:
        super().__init__()
        check_weights(step_size=step_size)
        self.step_size = step_size
        self.register_buffer("weights", torch.full((_at_least_one(num_groups),), 1 / num_groups))
        self.updated: Tensor | None = None

    def forward(self, losses: Tensor, groups: Tensor | None) -> Tensor:
        out = group_dro(losses, self._given(groups), self.weights, self.step_size)
        self.updated = out.weights
        return out.loss

    def after_step(self) -> None:
        """Keeps the weights of the last batch."""
        if self.updated is not None:
            self.weights.copy_(self.updated)
            self.updated = None


class CVaR(Risk):
    """The mean of the worst fraction `alpha` of a batch's losses: the worst case over unknown groups that large.

    alpha = 1 is the mean, a small alpha the largest loss. Source: Levy et al. 2020 (arXiv 2010.05893), section 2; over
    a batch it is biased towards the mean, less for larger batches.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
        self.alpha = alpha

    def forward(self, losses: Tensor, groups: Tensor | None) -> Tensor:
        return cvar(losses, self.alpha)


class WorstCaseFineTune(FineTune):
    """`FineTune` of a worst-case risk of the batch's losses instead of their mean.

    A grouped risk needs batches {"image", "label", "group"}; `robustft.fit` makes them from a dictionary of tensors, or
    from a data set with `groups`.

    Args:
        risk: `GroupDRO`, `WorstGroup`, `CVaR` or a `Risk` of your own; copied, its state is part of `state_dict()`.
        others: as for `FineTune`. The objective may be cross-entropy with a misalignment penalty; its further terms
            are means over a batch, not losses of samples, and are refused.

    Sources: those of the risks; the tower, head and start are `FineTune`'s, arXiv 2109.01903.
    """

    def __init__(self, model: nn.Module, *, risk: Risk, **options: Unpack[FineTuneOptions]) -> None:
        super().__init__(model, **options)
        if not self.objective.of_samples:
            raise ValueError(
                f"objective has terms without losses of single samples, {sorted(self.objective.terms)}, focal, "
                f"{self.objective.focal}, or rescale, {self.objective.rescale}; expected cross-entropy, with the "
                "misalignment penalty if wanted"
            )
        self.risk = copy.deepcopy(risk).to(self.head.device)

    @property
    def additive(self) -> bool:
        return False

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        groups = self.column(batch, "group")
        u = clip.encode_images(self.model, images)
        losses, terms = self.objective(u, self.head, labels, 1.0, bias=self.bias, reduction="none")
        risk = self.risk(losses, groups)
        out = Step(risk, {"risk": risk.detach(), "cross_entropy": terms["cross_entropy"].mean()})
        return out if self.l2_sp is None else self.l2_sp.added(out, self)

    def after_step(self) -> None:
        """Counts the step, and moves the risk's state."""
        super().after_step()
        self.risk.after_step()


def _at_least_one(num_groups: int) -> int:
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    check_count("num_groups", num_groups)
    return num_groups
