"""Local image features: one vector a patch, in the space of the texts.

CLIP trains its class token (its pooled cell) alone; the other tokens are only ever looked at through the values of the
last attention. So a patch's feature is what the tower would give if, where it mixes patches for the last time, that
patch was alone:

    ViT               h (N, L, width) enters the last block;   a = out_proj(value(ln_1 h))
                      h' = h + a;   t = h' + mlp(ln_2 h');   patches = ln_post(t)[:, 1:] @ proj       (N, P, D)
    ModifiedResNet    m (N, P, width) enters the attention pool;   patches = c_proj(v_proj(m))        (N, P, D)
    attention pool    h (N, L, width) enters it;   a = out_proj(value(h)), and what follows           SigLIP, PE, CoCa
    average pool      m (N, P, width) enters it, and what follows is of m itself                      ConvNeXt, FastViT

For open_clip's ViT this is the last block itself under a mask with nothing but the diagonal, which holds for every kind
of block that it has; for timm's, the block of sequences of a single token, where every softmax is 1. timm's other
kinds, and trunks under open_clip's own "abs_attn" and "rot_attn" pools, have none here. Source: GL-MCM (Miyai et al.,
arXiv 2304.04521), whose released code does this for CLIP's own towers, as does LoCoOp's; the value path is MaskCLIP's
idea (Zhou et al., arXiv 2112.01071). The other variant in the literature, the last block's output tokens, has been
mixed once more by an attention that no loss has shaped; it is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Mixing(NamedTuple):
    """Where a tower mixes patches for the last time, and features (N, P, D) from what enters it."""

    module: nn.Module
    alone: Callable[[Any, Tensor], Tensor]


@contextmanager
def last_inputs(visual: Any) -> Iterator[list[Tensor]]:
    """While open, the list receives what each pass of the tower puts into its last mixing of patches.

    ValueError for towers whose patches have no place in the space of the texts.
    """
    inputs: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])

    handle = _last_mixing(visual).module.register_forward_pre_hook(record)
    try:
        yield inputs
    finally:
        handle.remove()


def local_features(visual: Any, inputs: Tensor) -> Tensor:
    """Patch features (N, P, D) from what entered the last mixing; not normalised."""
    return _last_mixing(visual).alone(visual, inputs)


def check_patches(visual: Any) -> None:
    """ValueError for towers without patches in the space of the texts."""
    _last_mixing(visual)


def _last_mixing(visual: Any) -> _Mixing:
    pool: Any = getattr(visual, "attnpool", None)
    if isinstance(getattr(pool, "v_proj", None), nn.Linear):
        return _Mixing(pool, _of_cells)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is not None and hasattr(visual, "positional_embedding"):
        if getattr(visual, "attn_pool", None) is None:
            return _Mixing(blocks[-1], _of_last_block)
        if getattr(visual, "attn_pool_contrastive", None) is None:
            return _Mixing(visual.attn_pool, _of_captioners_pool)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and getattr(visual.head, "pool", None) is None:
        if isinstance(getattr(trunk, "attn_pool", None), nn.Module):
            return _Mixing(trunk.attn_pool, _of_timms_pool)
        if transformer := timms_blocks(trunk):
            return _Mixing(transformer[-1], _of_timms_block)
        head: Any = getattr(trunk, "head", None)
        if hasattr(head, "global_pool"):  # of trunks that end in a map
            return _Mixing(head, _of_map)
    raise ValueError(
        f"model: the {type(trunk or visual).__name__} tower has no patch features in the space of the texts; expected "
        "open_clip's VisionTransformer or ModifiedResNet, or of timm's towers a VisionTransformer, an Eva, or one that "
        "pools a map (ConvNeXt, FastVit, SwinTransformer). The other prompt learners and OOD scores read none"
    )


def timms_blocks(trunk: Any) -> Any:
    """The blocks of one of timm's ViTs, which may be called with one token more or less; None for others."""
    blocks = getattr(trunk, "blocks", None)
    if blocks is None or not all(hasattr(trunk, name) for name in ("num_prefix_tokens", "norm_pre", "norm")):
        return None
    return blocks


def _of_cells(visual: Any, inputs: Tensor) -> Tensor:
    return visual.attnpool.c_proj(visual.attnpool.v_proj(inputs.flatten(2).transpose(1, 2)))


def _of_last_block(visual: Any, inputs: Tensor) -> Tensor:
    batch_first = getattr(visual.transformer, "batch_first", True)
    length = inputs.shape[1 if batch_first else 0]
    itself = torch.full((length, length), -torch.inf, dtype=inputs.dtype, device=inputs.device).fill_diagonal_(0.0)
    tokens = visual.transformer.resblocks[-1](inputs, attn_mask=itself)
    # Prompts that a method has appended to the image's tokens are no patches.
    own = slice(1, len(visual.positional_embedding))
    tokens = visual.ln_post((tokens if batch_first else tokens.transpose(0, 1))[:, own])
    return tokens if visual.proj is None else tokens @ visual.proj


def _of_captioners_pool(visual: Any, inputs: Tensor) -> Tensor:
    pool, (n, _, width) = visual.attn_pool, inputs.shape
    one = pool.ln_k(inputs[:, 1:]).reshape(-1, 1, width)
    query = pool.ln_q(pool.query[:1]).expand(len(one), 1, -1)  # of a single key, every query gets its value
    tokens = visual.ln_post(pool.attn(query, one, one, need_weights=False)[0]).reshape(
        n, -1, visual.ln_post.weight.numel()
    )
    return tokens if visual.proj is None else tokens @ visual.proj


def _of_timms_pool(visual: Any, inputs: Tensor) -> Tensor:
    trunk, (n, _, width) = visual.trunk, inputs.shape
    one = inputs[:, trunk.num_prefix_tokens :].reshape(-1, 1, width)
    pooled = trunk.head(trunk.head_drop(trunk.fc_norm(trunk.attn_pool(one))))
    return visual.head(pooled).reshape(n, one.shape[0] // n, -1)


def _of_timms_block(visual: Any, inputs: Tensor) -> Tensor:
    trunk, (n, _, width) = visual.trunk, inputs.shape
    own = slice(trunk.num_prefix_tokens, trunk.num_prefix_tokens + trunk.patch_embed.num_patches)
    one = inputs[:, own].reshape(-1, 1, width)
    # Rotations by position turn queries and keys alone; `forward`, for hooks of deep prompts look for theirs.
    tokens = trunk.norm.forward(trunk.blocks[-1].forward(one))
    # Whichever of its tokens the trunk pools, it is this one.
    pooled = trunk.forward_head(tokens.expand(-1, 1 + trunk.num_prefix_tokens, -1))
    return visual.head(pooled).reshape(n, one.shape[0] // n, -1)


def _of_map(visual: Any, inputs: Tensor) -> Tensor:
    last = getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC"
    cells = (inputs if last else inputs.permute(0, 2, 3, 1)).flatten(1, 2)
    n, p, width = cells.shape
    one = cells.reshape(-1, *((1, 1, width) if last else (width, 1, 1)))
    return visual.head(visual.trunk.head(one)).reshape(n, p, -1)
