"""What a model computes with its weights, told by its modules: two models of equal keys and shapes may differ in it.

The activation, the number of heads, a norm's epsilon, the pooling, a mask, where a text ends, and how images are
normalised leave no trace in a state. Mixing the weights of models that differ in one of them, or saving a model under
another's configuration, gives a model that works and is wrong.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

from robustft.clip.encoding import unwrap
from robustft.clip.messages import few
from robustft.data.sources import stated_statistics
from robustft.ops.kinds import checked

# Attributes that change how, but not what, is computed from an image or text in evaluation mode.
_INNOCENT = frozenset(
    "batch_first drop_prob drop_rate dropout forward fused_attn grad_checkpointing gradient_checkpointing image_mean "
    "image_std inplace momentum name output_dict output_hidden_states output_tokens p prob scale_by_keep "
    "track_running_stats training use_fsdpa".split()
)
# Modules that hand on what they get in evaluation mode.
_NOTHING = {"Identity", "_DropoutNd", "DropPath", "PatchDropout"}


def settings(model: nn.Module) -> dict[str, object]:
    """What `model` computes with its weights: {place of a module or of one of its attributes: kind or value}.

    Kinds are those of modules without children, as the class next to nn.Module: a subclass that casts to float32, or
    that a wrapper made, is no other kind. Values are plain ones, functions, and image statistics. Copies have equal
    settings, also in other modes, precisions and wrappers.
    """
    found: dict[str, object] = {}
    for name, module in unwrap(model).named_modules():
        place = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if not any(True for _ in module.children()):
            kind = [base.__name__ for base in type(module).__mro__ if issubclass(base, nn.Module)][-2:][0]
            found[place] = "nothing" if kind in _NOTHING else kind
        for key, value in _values(module, not place):
            found[f"{place}.{key}" if place else key] = value
    return found


def _values(module: nn.Module, is_root: bool) -> list[tuple[str, object]]:
    values: list[tuple[str, object]] = []
    for key, value in vars(module).items():
        # People leave notes on a model (its name, an epoch); what open_clip's own classes read there is about texts.
        known = not is_root or key.startswith("text_") or key == "context_length"
        if key.startswith("_") or key in _INNOCENT or not known:
            continue
        if _is_plain(value):
            values.append((key, tuple(value) if isinstance(value, list) else value))
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType, functools.partial)):
            values.append((key, _words(value)))
    if "attn_mask" in module._buffers:
        values.append(("attn_mask", "none" if module._buffers["attn_mask"] is None else "a mask"))
    for key in ("hidden_act", "pad_token_id"):  # of Hugging Face's towers
        if hasattr(config := getattr(module, "config", None), key):
            values.append((f"config.{key}", getattr(config, key)))
    statistics = stated_statistics(module)
    return values + ([] if statistics is None else [("image mean and std", statistics)])


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(v, (bool, int, float, str)) for v in values)


def _words(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"{_words(function.func)}{function.args}{function.keywords}"
    return str(getattr(function, "__qualname__", function))


@checked
def check_same_computation(a: nn.Module, b: nn.Module, a_name: str, b_name: str) -> None:
    """Raises ValueError naming the settings, with both values, in which two models differ.

    What only one of them states (image statistics of a model that was built by hand) is no difference.
    """
    x, y = settings(a), settings(b)
    differing = [f"{key} is {x[key]} and {y[key]}" for key in x if key in y and x[key] != y[key]]
    if differing:
        raise ValueError(
            f"{a_name} and {b_name} compute different things with weights of one shape: {few(differing, 'settings')}"
        )


def is_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit, where they are, and compute the same with them."""
    a, b = unwrap(a), unwrap(b)
    if a is b:
        return True
    x, y = a.state_dict(), b.state_dict()
    if type(a) is not type(b) or x.keys() != y.keys() or _changed_from_outside(a) or _changed_from_outside(b):
        return False
    alike = all((x[k].shape, x[k].dtype, x[k].device) == (y[k].shape, y[k].dtype, y[k].device) for k in x)
    return alike and all(torch.equal(x[k], y[k]) for k in x) and settings(a) == settings(b)


def _changed_from_outside(model: nn.Module) -> bool:
    return any(
        module._forward_hooks or module._forward_pre_hooks or {"forward", "encode_image"} & vars(module).keys()
        for module in model.modules()
    )
