"""Methods that train a few parameters beside a frozen model.

    u (N, D) = normalize(f(x))    of the frozen image tower: no gradient, and no activations kept

A frozen model is not saved with every checkpoint: `state_dict` holds what is trained, and the configuration holds the
model's fingerprint, so that a run is never resumed on another model. It stays in evaluation mode, so that a ResNet
tower's running statistics stay the pre-trained ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.methods.base import Method, Shared
from robustft.methods.objective import Objective
from robustft.methods.zero_shot_reference import ZeroShotReference
from robustft.ops.kinds import described


class FrozenOptions(Shared, total=False):
    """The options of `FrozenModel`, for the constructors that hand them on."""

    objective: Objective


class FrozenModel(Method):
    """A method whose model (a copy, in evaluation mode) is never changed; it trains parameters of its own.

    Where `takes_features` is true a batch holds images, or their unit features (N, D) in the images' place:
    `robustft.clip.encode` once, then `fit(method, (features.image_features, features.labels), ...)` trains without
    the image tower, for as long as the images are not augmented.

    Args:
        objective: what the logits are trained with.
        others: as for `Method`.
    """

    towers = ()

    def __init__(self, model: nn.Module, *, objective: Objective = Objective(), **shared: Unpack[Shared]) -> None:
        super().__init__(model, **shared)
        self.model.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_without_the_model)
        self.objective = objective
        self.reference = ZeroShotReference(self, objective, trained=False)
        self.config |= {"model": clip.fingerprint(self.model), **self.reference.config}

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """u (N, D), unit rows of the frozen tower, or what was given in the images' place if `takes_features`."""
        return images if images.ndim == 2 else clip.encode_images(self.model, images)

    def train(self, mode: bool = True) -> FrozenModel:
        super().train(mode)
        self.model.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; the frozen model stays what it is."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is {described(state_dict)}; expected what state_dict() gave")
        model = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return super().load_state_dict({**state_dict, **model}, strict, assign)


def _without_the_model(method: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves in a state what is trained, and the steps."""
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        del state[name]


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """A linear layer with torch's default distribution, uniform in +-1/sqrt(inputs), drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer
