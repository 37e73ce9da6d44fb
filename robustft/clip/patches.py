"""Local image features: one vector a patch, in the space of the texts.

CLIP trains its class token (its pooled cell) alone; the other tokens are only ever looked at through the values of the
last attention. So a patch's feature is what the tower would give if, in its last attention, the patch saw itself alone:

    ViT               h (N, L, width) enters the last block;   a = out_proj(value(ln_1 h))
                      h' = h + a;   t = h' + mlp(ln_2 h');   patches = ln_post(t)[:, 1:] @ proj       (N, P, D)
    ModifiedResNet    m (N, P, width) enters the attention pool;   patches = c_proj(v_proj(m))        (N, P, D)

For the ViT this is the last block itself under a mask with nothing but the diagonal, which holds for every kind of
block that open_clip has. Source: GL-MCM (Miyai et al., arXiv 2304.04521), whose released code does this, as does
LoCoOp's; the value path is MaskCLIP's idea (Zhou et al., arXiv 2112.01071). The other variant in the literature, the
last block's output tokens, has been mixed once more by an attention that no loss has shaped; it is not offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def last_inputs(visual: Any) -> Iterator[list[Tensor]]:
    """While open, the list receives what each pass of the tower puts into its last attention.

    ValueError for towers whose patches have no place in the space of the texts.
    """
    inputs: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])

    handle = _last_attention(visual).register_forward_pre_hook(record)
    try:
        yield inputs
    finally:
        handle.remove()


def local_features(visual: Any, inputs: Tensor) -> Tensor:
    """Patch features (N, P, D) from what entered the last attention; not normalised."""
    last = _last_attention(visual)
    if hasattr(last, "v_proj"):  # an attention pool
        return last.c_proj(last.v_proj(inputs.flatten(2).transpose(1, 2)))
    batch_first = getattr(visual.transformer, "batch_first", True)
    length = inputs.shape[1 if batch_first else 0]
    itself = torch.full((length, length), -torch.inf, dtype=inputs.dtype, device=inputs.device).fill_diagonal_(0.0)
    tokens = last(inputs, attn_mask=itself)
    # Prompts that a method has appended to the image's tokens are no patches.
    own = slice(1, len(visual.positional_embedding))
    tokens = visual.ln_post((tokens if batch_first else tokens.transpose(0, 1))[:, own])
    return tokens if visual.proj is None else tokens @ visual.proj


def _last_attention(visual: Any) -> Any:
    pool = getattr(visual, "attnpool", None)
    if isinstance(getattr(pool, "v_proj", None), nn.Linear):
        return pool
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is not None and hasattr(visual, "positional_embedding") and getattr(visual, "attn_pool", None) is None:
        return blocks[-1]
    raise ValueError(
        f"model: the {type(visual).__name__} tower has no patch features in the space of the texts; expected "
        "open_clip's VisionTransformer without attentional pooling, or ModifiedResNet"
    )
