"""Methods that train a few parameters beside a frozen model.

    u (N, D) = normalize(f(x))    of the frozen image tower: no gradient, and no activations kept

A frozen model is not saved with every checkpoint: `state_dict` holds what is trained, and the configuration holds the
model's fingerprint, so that a run is never resumed on another model. It stays in evaluation mode, so that a ResNet
tower's running statistics stay the pre-trained ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.prompts import captions
from robustft.data.seeds import stateless_seed
from robustft.methods.base import Method
from robustft.methods.objective import Objective
from robustft.methods.zero_shot_reference import ZeroShotReference


class FrozenModel(Method):
    """A method whose model (a copy, in evaluation mode) is never changed; it trains parameters of its own.

    Where `takes_features` is true a batch holds images, or their unit features (N, D) in the images' place:
    `robustft.clip.encode` once, then `fit(method, (features.image_features, features.labels), ...)` trains without
    the image tower, for as long as the images are not augmented.

    Args:
        model, tokenizer, class_names, templates, total_steps, seed: as for `Method`.
        objective: what the logits are trained with.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[Any],
        total_steps: int | None = None,
        seed: int = 0,
        objective: Objective = Objective(),
    ) -> None:
        prompts = captions(class_names, templates)  # refuses what is no list of names or templates
        super().__init__(
            model,
            tokenizer=tokenizer,
            class_names=class_names,
            templates=templates,
            total_steps=total_steps,
            seed=seed,
        )
        self.model.requires_grad_(False).eval()
        self.objective = objective
        self.config |= {
            "model": clip.fingerprint(self.model),
            "prompts": stateless_seed(0, prompts),
            "objective": asdict(objective),
        }
        self.reference = ZeroShotReference(self, trained=False)
        self.config |= self.reference.config

    def labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch; ValueError for one of texts."""
        images, labels, _ = self.checked(batch)
        if labels is None:
            raise ValueError(f"{type(self).__name__} needs labels in the batch, which has texts only")
        return images, labels

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """u (N, D), unit rows of the frozen tower, or what was given in the images' place if `takes_features`."""
        return images if images.ndim == 2 else clip.encode_images(self.model, images)

    def train(self, mode: bool = True) -> FrozenModel:
        super().train(mode)
        self.model.eval()
        return self

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """What is trained, and the step; not the frozen model."""
        state = super().state_dict(*args, **options)
        for name in [name for name in state if name.startswith(f"{options.get('prefix', '')}model.")]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; the frozen model stays what it is."""
        model = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return super().load_state_dict({**state_dict, **model}, strict, assign)


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """A linear layer with torch's default distribution, uniform in +-1/sqrt(inputs), drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer
