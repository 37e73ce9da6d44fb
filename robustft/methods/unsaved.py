"""The model before training, which terms compare with: held beside a method's state.

Who makes a method again makes these again, so that checkpoints hold no second model. A run is resumed with the same
ones, because their fingerprints are in the method's `config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.methods.base import Method


class Unsaved(nn.Module):
    """A method's submodule that moves with it, yet has no parameters and no state: what it holds has them.

    `config`, a part of the method's, identifies what is held.
    """

    def __init__(self, *held: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.held = held  # a tuple, where nn.Module looks for no submodule
        self.config = config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unsaved:
        for module in self.held:  # .to(device) and .double() come by here
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Pretrained(Unsaved):
    """A frozen copy of a method's model as it is now, in evaluation mode: features without a gradient."""

    def __init__(self, method: Method) -> None:
        model = method.frozen_copy()
        super().__init__(model, config={"pretrained": clip.fingerprint(model)})

    @property
    def model(self) -> nn.Module:
        """What it holds: a module without parameters of its own."""
        return self.held[0]

    @property
    def logit_scale(self) -> Tensor:
        """s, 0-d."""
        return clip.logit_scale(self.model)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """u0 (N, D), unit rows."""
        return clip.encode_images(self.model, images)

    @torch.no_grad()
    def text_features(self, tokens: Tensor) -> Tensor:
        """t0 (M, D), unit rows, of tokens (M, L)."""
        return clip.encode_texts(self.model, tokens)
