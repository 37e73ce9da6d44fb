"""The last block of a ViT for its class token alone, where nothing else of what the block gives is looked at.

    h (N, L, width) enters the last block; of h' = h + attention(ln_1 h), h'' = h' + mlp(ln_2 h') CLIP's pooling takes
    row 0, which needs keys and values of all rows, and of everything else one: 2 of 12 width^2 products a row are left.

A twelfth of ViT-B's forward and backward, less what keys and values take: 7 %; a fifth of a tower with four blocks. The
same features to rounding, as a product of fewer rows may be summed in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.views import hooks_of, view_of, with_part


class _OfClassToken(nn.Module):
    """A view of open_clip's ResidualAttentionBlock that gives the first token alone, from all of them."""

    attn: Any
    ln_1: Any
    ln_2: Any
    ls_1: Any
    ls_2: Any
    mlp: Any

    def forward(self, q_x: Tensor, k_x: None = None, v_x: None = None, attn_mask: None = None) -> Tensor:
        normed = self.ln_1(q_x)
        first, query = (x[:, :1] if self.attn.batch_first else x[:1] for x in (q_x, normed))
        x: Tensor = first + self.ls_1(self.attn(query, normed, normed, need_weights=False)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def for_class_token(model: Any) -> Any:
    """The model with a last block of its image tower that gives the class token alone; itself where that would show.

    It would where the pooling takes more, where a hook or another `forward` sees the tokens, where dropout of the
    attention draws for them, and for a tower that is another's than open_clip's own, or whose blocks or attention are
    sharded, adapted, compiled or traced.
    """
    visual = model._modules.get("visual")
    if visual is None or hasattr(model, "reshard") or not _counts_alone(visual):
        return model
    stack = visual.transformer
    alone = view_of(stack.resblocks[-1], _OfClassToken)
    blocks = with_part(stack.resblocks, **{str(len(stack.resblocks) - 1): alone})
    return with_part(model, visual=with_part(visual, transformer=with_part(stack, resblocks=blocks)))


def _counts_alone(visual: Any) -> bool:
    """Whether nothing but the class token counts of what the last block gives."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _is(visual, "VisionTransformer"):
        return False
    if visual.pool_type != "tok" or visual.attn_pool is not None or "forward" in visual.__dict__:
        return False
    stack = visual.transformer
    block = stack.resblocks[-1]
    if not _is(stack, "Transformer") or not _is(block, "ResidualAttentionBlock"):
        return False
    if type(block.attn) is not nn.MultiheadAttention or block.attn.dropout:
        return False
    return not any(map(_is_followed, (stack, *block.modules())))


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module is of exactly that class of open_clip's, which need not be imported for it."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__ == "open_clip.transformer"


def _is_followed(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or any(hooks_of(module))
