"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) in the towers of an open_clip model, by peft.

    y = W x + b + (alpha / r) B A x        W (out, in) frozen;  A (r, in) random, B (out, r) 0 at the start
    W' = W + (alpha / r) B A               the same map, merged

peft puts its layers into the model in the places of those that they adapt, so that a model with adapters is an
open_clip model still: it is trained, encoded with and saved as any other. A model that its owner wrapped by peft,
`peft.get_peft_model(model, ...)`, is unwrapped to that.

peft's own layer for `nn.MultiheadAttention` merges its update into the frozen weights before each pass and subtracts it
afterwards, which leaves rounding in them and makes parameters anew. Models that share frozen weights cannot have that,
so `adapted_attention.Attention`, which takes its place, computes the merged weights beside the frozen ones.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any, get_args

import torch
from torch import nn

from robustft.clip.encoding import encode_images, encode_texts, text_tower, unwrap
from robustft.clip.outputs import evaluating
from robustft.clip.projections import text_projection, visual_projection
from robustft.machine import Towers
from robustft.ops.kinds import checked, described

TOWERS = ("visual", "text")
ADAPTER = "default"  # peft's own name of a model's one adapter


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of linear maps: which maps, and how large.

    Args:
        rank: r of A and B.
        alpha: the update is alpha / r times B A; None for 2 r.
        dropout: of what enters A in training. peft has none inside an `nn.MultiheadAttention`.
        targets: layers, by their names, the ends of these ("mlp.c_fc") or patterns ("*.resblocks.1?.attn"). An
            attention is one layer, its in- and out-projections. () for all attentions and linear layers of the towers,
            but the projections into the space of features; of a tower that has none, for its convolutions.
        towers: "visual", "text" or "both".
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] = ()
    towers: Towers = "both"

    def __post_init__(self) -> None:
        if not (_is_number(self.rank) and self.rank == int(self.rank) >= 1):
            raise ValueError(f"rank must be an integer, at least 1, got {described(self.rank)}")
        if self.alpha is not None and not (_is_number(self.alpha) and self.alpha > 0.0):
            raise ValueError(f"alpha must be a number, positive and finite, got {described(self.alpha)}")
        if not (_is_number(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"dropout must be a number in [0, 1), got {described(self.dropout)}")
        names = self.targets
        if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
            raise ValueError(f"targets must be a sequence of names of layers, got {described(names)}")
        if unnamed := [name for name in names if not isinstance(name, str) or not name]:
            raise ValueError(f"targets must hold names of layers, got {described(unnamed[0])}")
        if not isinstance(self.towers, str) or self.towers not in get_args(Towers):
            raise ValueError(f"towers must be one of {', '.join(get_args(Towers))}, got {described(self.towers)}")
        object.__setattr__(self, "targets", tuple(names))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def import_peft() -> ModuleType:
    """The peft module; ImportError naming the extra where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("peft is not installed: pip install 'robustft[lora]'", name="peft") from error
    return peft


@checked
def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put layers into a model."""
    return isinstance(getattr(unwrap(model), "peft_config", None), Mapping)


@checked
def adapt(model: nn.Module, lora: LoRA, *, towers: Sequence[str] = TOWERS, seed: int = 0) -> Any:
    """The model with adapters put into it, in place; nothing but these is trained any more.

    towers: those of `lora.towers` to take. seed: of A; torch's generator stays as it was. To know which layers its
    towers call, an empty image and an empty text are encoded. ValueError for targets that match none of these layers,
    with the names that there are, and for a model that has adapters; ImportError naming the extra without peft.
    """
    peft = import_peft()
    model = unwrap(model)
    if not isinstance(getattr(model, "visual", None), nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an open_clip model, which has visual")
    if has_adapters(model):
        raise ValueError("model has adapters already: train these, or merge them first (robustft.clip.merged)")
    names = _targets(model, lora, [name for name in towers if lora.towers in (name, "both")])
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, names)),  # a pattern matches whole names, a list of names their ends
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        injected = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    return adopted(injected)


def adopted(model: nn.Module) -> Any:
    """What peft wrapped, an open_clip model with layers of peft's in it; in place, its attentions leave frozen weights
    as they are. Any other model as it is."""
    model = unwrap(model)
    if has_adapters(model):
        import_peft()
        from robustft.clip.adapted_attention import Attention, MultiheadAttention

        for module in list(nn.Module.modules(model)):
            if type(module) is MultiheadAttention:
                module.__class__ = Attention
    return model


@checked
def copied(model: nn.Module) -> Any:
    """A copy of a model; of one with adapters, a copy that shares the frozen weights."""
    frozen = [p for p in model.parameters() if not p.requires_grad] if has_adapters(model) else []
    return copy.deepcopy(model, {id(p): p for p in frozen})


@checked
def merged(model: nn.Module) -> Any:
    """A model as open_clip builds it, without wrappers, with a model's adapters merged into its weights.

    A copy in memory of its own, all of whose parameters can be trained; a model without adapters is given back itself.
    """
    model = unwrap(model)
    return _without_layers(copy.deepcopy(model), merge=True) if has_adapters(model) else model


def base(model: nn.Module) -> Any:
    """The model as it is without its adapters; it shares the weights."""
    model = unwrap(model)
    if not has_adapters(model):
        return model
    return _without_layers(copy.deepcopy(model, {id(p): p for p in model.parameters()}), merge=False)


def _without_layers(model: nn.Module, *, merge: bool) -> nn.Module:
    """The model, in place, with the layers that peft adapts in the place of peft's."""
    peft = import_peft()
    from peft.utils.other import AuxiliaryTrainingWrapper

    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{above}.") for above in done):
            continue
        found: Any
        if isinstance(module, AuxiliaryTrainingWrapper):
            found = module
            found = found.modules_to_save[found.active_adapters[0]] if merge else found.original_module
        elif not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        elif callable(unload := getattr(module, "unload_and_optionally_merge_module", None)):
            found = unload(merge=merge, safe_merge=False, adapter_names=None)
        else:
            if merge:
                module.merge()
            found = module.get_base_layer()
        done.append(name)
        above, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(above), leaf, found)
    del model.peft_config
    return model.requires_grad_(True) if merge else model


def _targets(model: nn.Module, lora: LoRA, towers: Sequence[str]) -> list[str]:
    """Full names of the layers to adapt."""
    called = _called(model)
    prefixes = {"visual": "visual.", "text": "text." if text_tower(model) is not model else ""}
    kept = {
        name: layer
        for name, layer in called.items()
        if ("visual" if name.startswith("visual.") else "text") in towers
        and name.startswith(("visual.", prefixes["text"]))
    }
    if lora.targets:
        unmatched = [target for target in lora.targets if not any(_matches(name, target) for name in kept)]
        if unmatched:
            there = sorted({re.sub(r"\d+", "*", name) for name in kept})
            raise ValueError(
                f"lora targets {unmatched} match no layer that the {' and '.join(towers) or 'no'} tower calls; there "
                f"are {', '.join(there) or 'none'}"
            )
        return [name for name in kept if any(_matches(name, target) for target in lora.targets)]
    chosen: list[str] = []
    ends = _projections(model)
    for tower in towers:
        own = {name: layer for name, layer in kept.items() if name.startswith("visual.") == (tower == "visual")}
        maps = [name for name, layer in own.items() if not isinstance(layer, nn.Conv2d) and id(layer) not in ends]
        found = maps or [name for name, layer in own.items() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
        if not found:
            raise ValueError(f"lora: the {tower} tower of this {type(model).__name__} calls no layer to adapt")
        chosen += found
    if not chosen:
        raise ValueError(f"lora.towers is {lora.towers!r}, of which nothing is trained here")
    return chosen


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _projections(model: nn.Module) -> set[int]:
    """The ids of the layers whose weights map into the space of features."""
    found = set()
    for of in (visual_projection, text_projection):
        try:
            place = of(model).data_ptr()
        except ValueError:  # this tower ends otherwise
            continue
        found |= {id(m) for m in model.modules() if isinstance(m, nn.Linear) and m.weight.data_ptr() == place}
    return found


@torch.no_grad()
def _called(model: nn.Module) -> dict[str, nn.Module]:
    """Attentions, linear layers and convolutions, by name, whose `forward` runs when an image and a text are encoded.

    Some towers read a layer's weight and compute with it themselves: an adapter there would do nothing."""
    kinds = (nn.MultiheadAttention, nn.Linear, nn.Conv2d)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    # peft adapts no attention to keys of another width.
    layers = {name: module for name, module in layers.items() if getattr(module, "_qkv_same_embed_dim", True)}
    seen: set[int] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: seen.add(id(module))) for m in layers.values()]
    try:
        with evaluating(model):
            weight = next(model.parameters())
            encode_images(model, weight.new_zeros(1, 3, *_image_size(model)))
            length = getattr(text_tower(model), "context_length", None) or 1
            encode_texts(model, torch.zeros(1, length, dtype=torch.int64, device=weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in layers.items() if id(module) in seen}


def _image_size(model: Any) -> tuple[int, int]:
    size = getattr(model.visual, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else tuple(size)
