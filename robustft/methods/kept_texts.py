"""Text features that stay: those of a model that no step moves, or every so many steps.

    t (P, D)   features of all captions of a table of prompts, encoded once, until the model's weights are others

A teacher's captions are constants between its updates; a batch takes its own of them. What a step gets depends on the
weights and the batch alone, and not on what was encoded before it, so that a run that is resumed has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip import spread
from robustft.clip.prompts import PromptTable

CHUNK = 256  # captions that are encoded at once
WORTH = 2  # times as many captions have to be asked for as are encoded
MOST = 1 << 17  # captions; their features take 270 MB at D = 512


class KeptTexts:
    """The features of a table's captions under a frozen model. No module: checkpoints do not hold it."""

    def __init__(self, prompts: PromptTable) -> None:
        self.prompts = prompts
        self._state: tuple[object, ...] = ()
        self._features: Tensor | None = None
        self._weights: list[Tensor] = []  # held, so that no others come to lie where they did

    def __getstate__(self) -> dict[str, Any]:
        return vars(KeptTexts(self.prompts))  # copies and pickles begin anew

    @torch.no_grad()
    def of(self, model: nn.Module, captions: Tensor, steps: float) -> Tensor | None:
        """Unit features (U, D) of rows (U,) of the table; None where a step does better to encode these alone.

        That is where the model moves after so few `steps` that they ask for less than twice the table, where the table
        has more than 131,072 captions, where processes share the encoding, and where FSDP has divided the model.
        Memory: P D floats.
        """
        how = spread.current()
        all_of_them = len(self.prompts.captions)
        if all_of_them > MOST or all_of_them * WORTH > steps * len(captions):
            return None
        if how is not None and how.group is not None:
            return None
        if any(hasattr(module, "reshard") for module in model.modules()):
            return None
        parameters = list(model.parameters())
        device = parameters[0].device
        state = (
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
            *((p.data_ptr(), p._version, p.dtype) for p in parameters),
        )
        if self._features is None or state != self._state:
            with spread.spread(None):
                parts = [clip.encode_texts(model, part.to(device)) for part in self.prompts.captions.split(CHUNK)]
            self._state, self._features = state, torch.cat(parts)
            self._weights = [p.detach() for p in parameters]
        return self._features[captions.to(device, non_blocking=True)]
