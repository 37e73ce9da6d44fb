"""L2-SP: fine-tune, but not far from the start (Li, Grandvalet, Davoine, ICML 2018, arXiv 1802.01483).

L + beta / 2 ||theta - theta_0||^2      over all that is trained; theta_0 as it was when the method was made
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from robustft.losses import weighted_sum
from robustft.methods.base import Step
from robustft.ops.precision import at_least_float32


class L2SP(nn.Module):
    """The pull of a method's trained parameters towards their start, of which it keeps a copy in the state.

    The paper pulls the classifier's own weights towards 0, because they have no start there; a head that starts as
    the zero-shot one has, and is pulled towards it. The pull is part of the loss; weight decay, which pulls to 0, is
    best turned off beside it. The copy is one more model in memory and in checkpoints.
    """

    def __init__(self, method: nn.Module, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.names = [name for name, p in method.named_parameters() if p.requires_grad]
        parameters = dict(method.named_parameters())
        for i, name in enumerate(self.names):  # by number: a buffer's name holds no dots
            self.register_buffer(f"start_{i}", parameters[name].detach().clone())

    def distance(self, method: nn.Module) -> Tensor:
        """1/2 ||theta - theta_0||^2, 0-d, at least float32; the gradient is the difference."""
        parameters = dict(method.named_parameters())
        squares = {
            name: (at_least_float32(parameters[name]) - at_least_float32(self.get_buffer(f"start_{i}"))).square().sum()
            for i, name in enumerate(self.names)
        }
        return 0.5 * weighted_sum(squares, dict.fromkeys(squares, 1.0))

    def added(self, step: Step, method: nn.Module) -> Step:
        """The step with the pull in its loss, and as the term "l2_sp"."""
        distance = self.distance(method)
        return Step(step.loss + self.beta * distance, {**step.terms, "l2_sp": distance.detach()})


def check_l2_sp(beta: float) -> None:
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"l2_sp is {beta}; expected a weight, finite and not negative")
