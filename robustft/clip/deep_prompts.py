"""Learnt tokens inside open_clip's transformers, put there while a context is open.

    text     x (M, L, width)       tokens `positions` (M, n) are replaced by p_j (n, width) at the entrance of block
                                   j = 1, 2, ...; those of block 0 come with the embeddings
    visual   x (N, 1 + P, width)   q_0 (n, width) is appended before the first norm, and replaced by q_j at the
                                   entrance of block j; these tokens are dropped again before pooling

Blocks beyond the prompts keep the tokens that the blocks before have made. The model itself stays as it is. This is
how MaPLe (arXiv 2210.03117) runs both towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.encoding import text_tower, token_embedding, unwrap


def text_layers(model: nn.Module) -> int:
    """How many blocks the text tower has. ValueError for towers other than open_clip's own."""
    token_embedding(model)
    return len(_blocks(text_tower(model)))


def visual_layers(model: nn.Module) -> int:
    """How many blocks the image tower has. ValueError for what is not open_clip's own ViT."""
    visual = unwrap(model).visual
    if not isinstance(getattr(visual, "ln_pre", None), nn.Module) or not hasattr(visual, "class_embedding"):
        raise ValueError(f"model: deep prompts need open_clip's own ViT as image tower, got {type(visual).__name__}")
    return len(_blocks(visual))


def visual_width(model: nn.Module) -> int:
    """Width of the ViT's tokens."""
    return unwrap(model).visual.class_embedding.shape[-1]


@contextmanager
def text_prompts(model: nn.Module, prompts: Sequence[Tensor], positions: Tensor) -> Iterator[None]:
    """Replace the tokens `positions` (M, n) at the entrance of blocks 1, 2, ... by prompts, (n, width) each."""
    tower = text_tower(model)

    def replace(x: Tensor, prompt: Tensor) -> Tensor:
        places = positions[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, places, prompt.to(x.dtype).expand(len(x), -1, -1))

    with ExitStack() as hooks:
        for block, prompt in zip(_blocks(tower)[1:], prompts, strict=False):
            _at_entrance(hooks, tower, block, lambda x, prompt=prompt: replace(x, prompt))
        yield


@contextmanager
def visual_prompts(model: nn.Module, prompts: Sequence[Tensor]) -> Iterator[None]:
    """Append prompts[0] (n, width) to the image's tokens, and replace it by prompts[j] at the entrance of block j."""
    visual = unwrap(model).visual
    n = prompts[0].shape[0]

    def append(x: Tensor, prompt: Tensor) -> Tensor:
        return torch.cat([x, prompt.to(x.dtype).expand(len(x), -1, -1)], 1)

    with ExitStack() as hooks:
        first = visual.ln_pre.register_forward_pre_hook(lambda _module, arguments: (append(arguments[0], prompts[0]),))
        hooks.callback(first.remove)
        for block, prompt in zip(_blocks(visual)[1:], prompts[1:], strict=False):
            _at_entrance(hooks, visual, block, lambda x, prompt=prompt: append(x[:, :-n], prompt))
        last = visual.transformer.register_forward_hook(lambda _module, _arguments, x: x[:, :-n])
        hooks.callback(last.remove)
        yield


def _at_entrance(hooks: ExitStack, tower: Any, block: nn.Module, change: Any) -> None:
    """Change what enters a block, (N, L, width), also where the tower has it as (L, N, width)."""
    batch_first = getattr(tower.transformer, "batch_first", True)

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        return (change(x) if batch_first else change(x.transpose(0, 1)).transpose(0, 1), *rest)

    hooks.callback(block.register_forward_pre_hook(hook).remove)


def _blocks(tower: Any) -> nn.ModuleList:
    # A block that is run again in the backward would not find its prompt any more.
    if getattr(tower.transformer, "grad_checkpointing", False):
        raise ValueError("model: deep prompts need gradient checkpointing off: model.set_grad_checkpointing(False)")
    return tower.transformer.resblocks
