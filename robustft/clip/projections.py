"""The last linear map of a tower, into the space of features: CaRot's penalties act on it, tune="projection" trains it.

u = normalise(h W + b)             h (N, width) the tower's last hidden state, W (width, D)
W = W_0 + (alpha / r) A^T B^T      under low-rank adapters (`robustft.clip.adapters`): what the tower computes with
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from robustft.clip.encoding import unwrap, whole
from robustft.ops.kinds import checked

_VISUAL = (
    "visual.proj",  # open_clip's ViT
    "visual.attnpool.c_proj",  # ModifiedResNet
    # timm's: the head that open_clip puts on the trunk, then the trunk's own, then its attention pool
    "visual.head.proj",
    "visual.head.mlp.fc2",
    "visual.head.pool.proj",
    "visual.trunk.head",
    "visual.trunk.head.fc",
    "visual.trunk.fc",
    "visual.trunk.attn_pool.mlp.fc2",
    "visual.trunk.attn_pool.proj",
)
_TEXT = (
    "text_projection",  # of CLIP
    "text.text_projection",
    "text.proj",  # of Hugging Face's, linear
    "text.proj.2",  # and the last layer of an MLP
)


@checked
def visual_projection(model: nn.Module) -> Tensor:
    """W (width, D), the last linear map of the image tower: the parameter or a view of it; gradients reach it.

    Image feature = h @ W (+ bias) for open_clip's ViT and ModifiedResNet, and for timm's trunks under a linear head or
    an MLP, open_clip's or their own. Where the tower ends in timm's attention pool (SigLIP), W is the last map of its
    MLP, to whose output the pooled tokens are added. Of a map with low-rank adapters, W has their update, and gradients
    reach these. Raises ValueError for towers without a final linear map.
    """
    return _projection(model, "visual", _VISUAL)


@checked
def text_projection(model: nn.Module) -> Tensor:
    """W (width, D) with text feature = h @ W (+ bias): the parameter or a view of it; gradients reach it.

    Found for open_clip's own text tower, in `CLIP` and `CustomTextCLIP`, and for Hugging Face towers with a linear
    projection or an MLP, of which it is the last map. Adapters and errors: as in `visual_projection`.
    """
    return _projection(model, "text", _TEXT)


@checked
def feature_width(model: nn.Module) -> int | None:
    """D of a model's features, None where neither tower says."""
    model = unwrap(model)
    for tower in (getattr(model, "visual", None), getattr(model, "text", None)):
        if isinstance(width := getattr(tower, "output_dim", None), int):
            return width
    # Of CLIP, whose text tower says nothing, with one of timm's.
    match _last(model, _TEXT):
        case None:
            return None
        case Tensor() as weight:
            return weight.shape[1]
        case layer:
            return _linear(layer).out_features


def _projection(model: nn.Module, tower: str, paths: Sequence[str]) -> Tensor:
    match _last(model, paths):
        case None:
            raise ValueError(
                f"model: the {tower} tower of this {type(unwrap(model)).__name__} does not end in a linear projection "
                f"(looked for {', '.join(paths)})"
            )
        case Tensor() as weight:
            return whole(weight)
        case layer:
            return _weight(layer).T


def _last(model: nn.Module, paths: Sequence[str]) -> Any:
    """The first of the paths that leads to a linear map: a tensor (width, D) or a layer, maybe one of peft's."""
    for path in paths:
        part: Any = unwrap(model)
        for name in path.split("."):
            part = getattr(part, name, None)
        if isinstance(part, Tensor) or _linear(part) is not None:
            return part
    return None


def _linear(layer: Any) -> Any:
    """The `nn.Linear` that a layer is, or that it is of peft's; None for any other layer."""
    if hasattr(layer, "modules_to_save"):  # peft's, of a layer in whose place it trains a copy
        copies = [] if layer.disable_adapters else [layer.modules_to_save[name] for name in layer.active_adapters]
        layer = copies[0] if copies else layer.original_module
    elif _is_adapted(layer):
        layer = layer.get_base_layer()
    return layer if isinstance(layer, nn.Linear) else None


def _is_adapted(layer: Any) -> bool:
    return callable(getattr(layer, "get_base_layer", None))


def _weight(layer: Any) -> Tensor:
    """The weight (D, width) that a linear layer computes with."""
    weight = whole(_linear(layer).weight)
    if not _is_adapted(layer) or layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if not hasattr(layer, "get_delta_weight") or name in getattr(layer, "lora_variant", {}):
            raise ValueError(
                f"model: its last linear map is adapted otherwise than by adding a matrix ({type(layer).__name__} of "
                "peft): merge the adapters first, or give the map none"
            )
        if name in layer.r:
            weight = weight + whole(layer.get_delta_weight(name)).to(weight.dtype)
    return weight
