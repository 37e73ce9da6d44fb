"""Learnt tokens inside transformers of open_clip and timm, put there while a context is open.

    text     x (M, L, width)       tokens `positions` (M, n) are replaced by p_j (n, width) at the entrance of block
                                   j = 1, 2, ...; those of block 0 come with the embeddings
    visual   x (N, 1 + P, width)   q_0 (n, width) is appended before the first norm, and replaced by q_j at the
                                   entrance of block j; these tokens are dropped again before pooling
             r (1 + P, 2 d)        rotations of timm's EVA and PE, by position: sine 0 and cosine 1 for what is appended

Blocks beyond the prompts keep the tokens that the blocks before have made. The model itself stays as it is. This is
how MaPLe (arXiv 2210.03117) runs both towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustft.clip.encoding import text_tower, token_embedding, unwrap
from robustft.clip.patches import timms_blocks

_OTHERS = "CoOp, KgCoOp, ProDA and CoCoOp learn prompts of the text tower's entrance alone"


def text_layers(model: nn.Module) -> int:
    """How many blocks the text tower has. ValueError for towers other than open_clip's own."""
    token_embedding(model)
    tower = text_tower(model)
    if not hasattr(getattr(tower, "transformer", None), "resblocks"):
        raise ValueError(
            f"model: deep prompts need open_clip's own text tower, got {type(tower).__name__}. {_OTHERS}, which "
            "Hugging Face's has too"
        )
    return len(_blocks(tower))


def visual_layers(model: nn.Module) -> int:
    """How many blocks the image tower has. ValueError for what is no ViT of open_clip's or timm's."""
    return len(_visual(model).blocks)


def visual_width(model: nn.Module) -> int:
    """Width of the ViT's tokens."""
    return _visual(model).width


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
    tower, n = _visual(model), prompts[0].shape[0]

    def append(x: Tensor, prompt: Tensor) -> Tensor:
        return torch.cat([x, prompt.to(x.dtype).expand(len(x), -1, -1)], 1)

    def unturned(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        if isinstance(rope := keywords.get("rope"), Tensor):
            sine, cosine = rope.new_zeros(n, rope.shape[-1] // 2), rope.new_ones(n, rope.shape[-1] // 2)
            keywords = {**keywords, "rope": torch.cat([rope, torch.cat([sine, cosine], 1)])}
        return arguments, keywords

    with ExitStack() as hooks:
        first = tower.entrance.register_forward_pre_hook(lambda _module, given: (append(given[0], prompts[0]),))
        hooks.callback(first.remove)
        for block, prompt in zip(tower.blocks[1:], prompts[1:], strict=False):
            _at_entrance(hooks, tower.module, block, lambda x, prompt=prompt: append(x[:, :-n], prompt))
        if tower.timms:
            for block in tower.blocks:
                hooks.callback(block.register_forward_pre_hook(unturned, with_kwargs=True).remove)
            last = tower.module.norm.register_forward_pre_hook(lambda _module, given: (given[0][:, :-n],))
        else:
            last = tower.module.transformer.register_forward_hook(lambda _module, _given, x: x[:, :-n])
        hooks.callback(last.remove)
        yield


class _Visual(NamedTuple):
    """What deep prompts need of an image tower."""

    module: Any  # open_clip's, or the trunk of timm's
    timms: bool
    entrance: nn.Module  # all tokens go through it before the first block
    blocks: nn.ModuleList
    width: int


def _visual(model: nn.Module) -> _Visual:
    visual = unwrap(model).visual
    if isinstance(getattr(visual, "ln_pre", None), nn.Module) and hasattr(visual, "class_embedding"):
        return _Visual(visual, False, visual.ln_pre, _blocks(visual), visual.class_embedding.shape[-1])
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and timms_blocks(trunk) is not None:
        _check_checkpointing(trunk)
        return _Visual(trunk, True, trunk.norm_pre, nn.ModuleList(trunk.blocks), trunk.embed_dim)
    raise ValueError(
        "model: deep prompts need a ViT as image tower, open_clip's own or timm's VisionTransformer or Eva, got "
        f"{type(visual if trunk is None else trunk).__name__}. {_OTHERS}"
    )


def _at_entrance(hooks: ExitStack, tower: Any, block: nn.Module, change: Any) -> None:
    """Change what enters a block, (N, L, width), also where the tower has it as (L, N, width)."""
    batch_first = getattr(getattr(tower, "transformer", None), "batch_first", True)

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        return (change(x) if batch_first else change(x.transpose(0, 1)).transpose(0, 1), *rest)

    hooks.callback(block.register_forward_pre_hook(hook).remove)


def _blocks(tower: Any) -> nn.ModuleList:
    _check_checkpointing(tower.transformer)
    return tower.transformer.resblocks


def _check_checkpointing(transformer: Any) -> None:
    # A block that is run again in the backward would not find its prompt any more.
    if getattr(transformer, "grad_checkpointing", False):
        raise ValueError("model: deep prompts need gradient checkpointing off: model.set_grad_checkpointing(False)")
