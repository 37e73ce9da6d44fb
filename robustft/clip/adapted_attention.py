"""An `nn.MultiheadAttention` with low-rank updates of its in- and out-projection. Imports peft.

    W_in' = W_in + (alpha / r) B_in A_in        (3D, D)
    W_out' = W_out + n (alpha / r) B_out A_out  (D, D)      n times, as often as the installed peft adds it

The frozen W are left as they are, so that several models and threads may use them at a time. The merged ones, and their
gradients, live as long as a pass.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn


def _out_updates() -> int:
    """n, of a layer with weights of 1: peft 0.21 merges the update twice, in training too.

    What an adapter computes in peft, it computes here.
    """
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        layers: Any = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(1, 1)), config).get_base_model()
    outside = layers[0].base_layer.out_proj
    before = outside.get_base_layer().weight.item()
    with torch.no_grad():
        for factor in (outside.lora_A, outside.lora_B):
            factor["default"].weight.fill_(1.0)
    layers[0].merge()
    return round(outside.get_base_layer().weight.item() - before)


OUT_UPDATES = _out_updates()


class Attention(MultiheadAttention):
    """peft's layer, with its names in a state, that computes beside the frozen weights."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        inside: Any = self.get_base_layer()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.r]
        if not active:
            return inside(query, *args, **kwargs)
        outside = inside.out_proj
        w, o = inside.in_proj_weight, outside.get_base_layer().weight
        for name in active:
            w = w + self.get_delta_weight(name).to(w.dtype)
            o = o + OUT_UPDATES * outside.get_delta_weight(name).to(o.dtype)
        return _attended(inside, w, o, query, *args, **kwargs)

    def _restore_weights(self) -> None:
        """peft makes the frozen parameters anew wherever a model is looked through; needed while merged alone."""
        if self.merged:
            super()._restore_weights()


def _attended(
    layer: Any,
    w: Tensor,
    o: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What an `nn.MultiheadAttention` computes, with w (3D, D) and o (D, D) as weights of its projections."""
    turned = layer.batch_first and query.ndim == 3
    if turned:  # what is one tensor stays one: torch then projects it in one product
        of_query = query.transpose(0, 1)
        of_key = of_query if key is query else key.transpose(0, 1)
        query, key, value = of_query, of_key, of_key if value is key else value.transpose(0, 1)
    y, attention = F.multi_head_attention_forward(
        query,
        key,
        value,
        layer.embed_dim,
        layer.num_heads,
        w,
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        layer.dropout,
        o,
        layer.out_proj.get_base_layer().bias,
        training=layer.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return y.transpose(0, 1) if turned else y, attention
