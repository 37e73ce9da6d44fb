"""Checks of `robustft.functional`'s arguments: an error names the argument, what it was and what was expected."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from robustft.ops.kinds import array as array
from robustft.ops.kinds import check_fields as check_fields
from robustft.ops.kinds import checked as checked
from robustft.ops.kinds import dense as dense
from robustft.ops.kinds import described as described
from robustft.ops.kinds import has_numbers as has_numbers
from robustft.ops.kinds import taking

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
VARIANTS = ("neg_log_ratio", "neg_ratio", "softplus", "ratio")
"""Forms of the misalignment penalty."""
AUTO_MEMORY, AUTO_GPU_MEMORY = 2**29, 2**32
"""What `memory="auto"` lets a loss keep for its backward, in bytes: on the CPU 11,585 x 11,585 similarities of float32,
on a GPU two matrices of 32,768 x 32,768 in bfloat16."""


def readable(values: Tensor) -> bool:
    """Whether looking at its numbers is possible, and means neither waiting for a GPU nor breaking a graph."""
    return not torch.compiler.is_compiling() and values.is_cpu and has_numbers(values)


def own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`checked`, and outside autocast: it takes features in the dtype they come in and widens them where it must.

    This is the operators' autocast rule. Under autocast the eager forms would be rounded to half precision.
    """
    take = taking(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        traced = torch.compiler.is_compiling()
        given, options = (args, kwargs) if traced else take(args, kwargs)
        if not traced and not torch._C._is_any_autocast_enabled():
            return function(*given, **options)
        first = given[0] if given and isinstance(given[0], Tensor) else _first_tensor((*given, *options.values()))
        if first is None or first.is_meta or not torch.is_autocast_enabled(first.device.type):
            return function(*given, **options)
        with torch.autocast(first.device.type, enabled=False):
            return function(*given, **options)

    return wrapper


def _first_tensor(values: tuple[Any, ...]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)


def feature_pair(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked, in one dtype, the scale as a tensor beside them."""
    x, t = image_features, text_features
    if alike(x, t) and x.shape == t.shape:  # nothing to say: at N = 8 the questions below take as long as a product
        return x, t, scale_tensor(logit_scale, x.device, f"{prefix}logit_scale")
    names = f"{prefix}image_features", f"{prefix}text_features", f"{prefix}logit_scale"
    for name, features in zip(names, (image_features, text_features), strict=False):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} is {type(features).__name__}; expected a tensor")
        if features.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; expected (N, D)")
        if features.dtype not in FLOATS:
            raise TypeError(f"{name} is {features.dtype}; expected float64, float32, bfloat16 or float16")
        if len(features) == 0:
            raise ValueError(f"{name} has no rows; expected a batch of at least one")
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"{names[1]} has shape {tuple(text_features.shape)}; expected {tuple(image_features.shape)}, as {names[0]}"
        )
    if image_features.device != text_features.device:
        raise ValueError(f"{names[1]} is on {text_features.device}; expected {image_features.device}, as {names[0]}")
    if image_features.dtype != text_features.dtype:
        wider = torch.promote_types(image_features.dtype, text_features.dtype)
        image_features, text_features = image_features.to(wider), text_features.to(wider)
    return image_features, text_features, scale_tensor(logit_scale, image_features.device, names[2])


def alike(x: Tensor, t: Tensor) -> bool:
    """Whether both are matrices of one floating dtype, on one device, and x is not empty."""
    return (
        isinstance(x, Tensor)
        and isinstance(t, Tensor)
        and x.dim() == t.dim() == 2
        and x.dtype == t.dtype
        and x.dtype in FLOATS
        and x.device == t.device
        and x.shape[0] > 0
    )


def class_inputs(
    features: Tensor, embeddings: Tensor, logit_scale: Tensor | float, name: str = "class_embeddings"
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked, in one dtype, the scale as a tensor beside them."""
    if alike(features, embeddings) and features.shape[1] == embeddings.shape[1] and embeddings.shape[0]:
        return features, embeddings, scale_tensor(logit_scale, features.device)
    for argument, value in (("features", features), (name, embeddings)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} is {type(value).__name__}; expected a tensor")
        if value.dim() != 2 or len(value) == 0:
            raise ValueError(f"{argument} has shape {tuple(value.shape)}; expected two dimensions, not empty")
        if value.dtype not in FLOATS:
            raise TypeError(f"{argument} is {value.dtype}; expected float64, float32, bfloat16 or float16")
    if features.shape[1] != embeddings.shape[1]:
        raise ValueError(f"{name} has {embeddings.shape[1]} dimensions; expected {features.shape[1]}, as features")
    if features.device != embeddings.device:
        raise ValueError(f"{name} is on {embeddings.device}; expected {features.device}, as features")
    if features.dtype != embeddings.dtype:
        wider = torch.promote_types(features.dtype, embeddings.dtype)
        features, embeddings = features.to(wider), embeddings.to(wider)
    return features, embeddings, scale_tensor(logit_scale, features.device)


def class_labels(labels: Tensor, n: int, device: torch.device) -> Tensor:
    """Checked, as int64, but for their range."""
    if labels is None:
        raise TypeError(f"labels is None; expected a tensor of integers ({n},)")
    indices = sample_labels(labels, n, device)
    assert indices is not None
    return indices


def check_classes(labels: Tensor, k: int) -> None:
    """ValueError unless labels lie in [0, k), where they can be looked at."""
    check_range("labels", labels, k, f", K = {k} classes")


FEW_LABELS = 64
"""Labels of which a list is looked through sooner than by torch's operator: 8 in 1.3 us rather than 3.8, 32 in 2.3."""


def check_range(name: str, values: Tensor, limit: int, meaning: str = "") -> None:
    """Integers in [0, limit), where looking does not mean waiting for a GPU or breaking a graph."""
    if not readable(values):
        return
    wide = values.long()  # unsigned ones have no minimum
    if wide.dim() == 1 and 0 < len(wide) <= FEW_LABELS:
        listed = wide.tolist()
        lowest, highest = min(listed), max(listed)
    else:
        lowest, highest = (int(end) for end in wide.aminmax())
    if lowest < 0 or highest >= limit:
        raise ValueError(f"{name} holds {lowest}..{highest}; expected values in [0, {limit}){meaning}")


def loss_vector(losses: Tensor) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses is {type(losses).__name__}; expected a tensor (N,)")
    if losses.dim() != 1 or losses.dtype not in FLOATS or losses.numel() == 0:
        raise ValueError(f"losses is {tuple(losses.shape)} {losses.dtype}; expected floating (N,), not empty")


def group_weights(weights: Tensor, step_size: float) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is {type(weights).__name__}; expected a tensor (G,)")
    if weights.dim() != 1 or weights.dtype not in (torch.float32, torch.float64) or len(weights) == 0:
        raise ValueError(
            f"weights is {tuple(weights.shape)} {weights.dtype}; expected float32 or float64 (G,), not empty"
        )
    if not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size is {step_size}; expected a finite number, not negative")
    if not readable(weights):
        return
    lowest, highest = (float(end) for end in weights.detach().aminmax())
    if lowest < 0 or highest == 0:
        raise ValueError(f"weights holds {lowest}..{highest}; expected none negative and not all zero")


def group_indices(groups: Tensor, losses: Tensor, num_groups: int) -> Tensor:
    """Checked, as int64, but for their range."""
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups is {type(groups).__name__}; expected a tensor of integers {tuple(losses.shape)}")
    if groups.shape != losses.shape or groups.dtype not in INTEGERS or groups.device != losses.device:
        raise ValueError(
            f"groups is {tuple(groups.shape)} {groups.dtype} on {groups.device}; expected integers "
            f"{tuple(losses.shape)} on {losses.device}, as losses"
        )
    check_count("num_groups", num_groups)
    return groups if groups.dtype == torch.int64 else groups.long()


MOST = 2**24
"""Groups or bins that may be asked for: memory is taken for each, and no data set has as many."""


def check_count(name: str, number: int, most: int = MOST) -> None:
    """ValueError unless so many groups or bins can be counted in."""
    if number < 1:
        raise ValueError(f"{name} is {number}; expected at least 1")
    if number > most:
        raise ValueError(f"{name} is {number}; expected at most {most:,}: memory is taken for each")


def check_unit_norm(name: str, dtype: torch.dtype, low: float, high: float) -> None:
    """By the lowest and the highest norm of the rows of features of that dtype."""
    tolerance = 1e-3 if dtype in (torch.float64, torch.float32) else 1e-2  # of unit vectors as rounded
    if not (1 - tolerance <= low and high <= 1 + tolerance):
        raise ValueError(
            f"{name} has rows of norm {low:.4g} to {high:.4g}; expected 1 within {tolerance:g}: pass "
            "torch.nn.functional.normalize(..., dim=1), scores are of cosines"
        )


def check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}")


def scale_tensor(logit_scale: Tensor | float, device: torch.device, name: str = "logit_scale") -> Tensor:
    if not isinstance(logit_scale, Tensor):
        if not logit_scale >= 0:
            raise ValueError(f"{name} is {logit_scale}; expected the multiplied-out scale exp(...), not negative")
        # float64: a Python float is not to be rounded to bfloat16 on its way
        # filled rather than copied: a copy to a GPU waits for it
        logit_scale = torch.full((), float(logit_scale), dtype=torch.float64, device=device)
    scale = _one_number(logit_scale, device, name)
    if readable(scale) and scale.item() < 0:
        raise ValueError(f"{name} is {scale.item()}; expected the multiplied-out scale exp(...), not negative")
    return scale


def bias_tensor(logit_bias: Tensor | float, device: torch.device, name: str = "logit_bias") -> Tensor:
    """Checked, as a tensor on the device, 0-d; any sign."""
    if not isinstance(logit_bias, Tensor):
        logit_bias = torch.full((), float(logit_bias), dtype=torch.float64, device=device)
    return _one_number(logit_bias, device, name)


def _one_number(number: Tensor, device: torch.device, name: str) -> Tensor:
    if number.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(number.shape)}; expected one element")
    if number.device != device:
        raise ValueError(f"{name} is on {number.device}; expected {device}, as the features")
    if number.dtype == torch.bool or number.dtype.is_complex:
        raise TypeError(f"{name} is {number.dtype}; expected a floating number")
    if not number.dtype.is_floating_point:
        number = number.double()
    return number.reshape(()) if number.dim() else number


def sample_labels(labels: Tensor | None, n: int, device: torch.device) -> Tensor | None:
    """Checked, as int64, if there are any."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is {type(labels).__name__}; expected a tensor of integers ({n},)")
    if labels.shape != (n,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected ({n},), one per sample")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels is {labels.dtype}; expected integers")
    if labels.device != device:
        raise ValueError(f"labels is on {labels.device}; expected {device}, as image_features")
    return labels if labels.dtype == torch.int64 else labels.long()


def check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1)")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")


def check_weight(weight: Tensor | None, n: int, device: torch.device) -> None:
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight is {type(weight).__name__}; expected a tensor ({n},)")
    if weight is not None and (weight.shape != (n,) or weight.device != device):
        raise ValueError(f"weight is {tuple(weight.shape)} on {weight.device}; expected ({n},) on {device}")
    if weight is not None and (weight.dtype == torch.bool or weight.dtype.is_complex):
        raise TypeError(f"weight is {weight.dtype}; expected numbers ({n},)")


def memory_budget(memory: str | int, device: torch.device) -> int:
    """`memory` in bytes."""
    if isinstance(memory, str) and memory == "auto":
        return AUTO_MEMORY if device.type == "cpu" else AUTO_GPU_MEMORY
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
        raise ValueError(f"memory is {memory!r}; expected 'auto' or a number of bytes, 0 to keep nothing")
    return memory


def neighbor_points(points: Tensor, name: str = "points", may_be_empty: bool = False) -> Tensor:
    """Checked, detached, float64 as it is and anything else as float32."""
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} is {type(points).__name__}; expected a tensor")
    if points.dim() != 2 or points.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; expected (N, D), D at least 1")
    if points.dtype not in FLOATS:
        raise TypeError(f"{name} is {points.dtype}; expected float64, float32, bfloat16 or float16")
    if len(points) == 0 and not may_be_empty:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; expected at least one point")
    points = points.detach()
    return points if points.dtype == torch.float64 else points.float()


def neighbor_queries(queries: Tensor, points: Tensor) -> Tensor:
    """Checked against the points, detached; may be empty."""
    queries = neighbor_points(queries, "queries", may_be_empty=True)
    if queries.shape[1] != points.shape[1]:
        raise ValueError(f"queries has {queries.shape[1]} dimensions; expected {points.shape[1]}, as points")
    if queries.device != points.device:
        raise ValueError(f"queries is on {queries.device}; expected {points.device}, as points")
    return queries


def check_neighbors(k: Any, n: int) -> int:
    """k as an int in [1, n]; a symbolic one, of a traced call, as it is."""
    symbolic = isinstance(k, torch.SymInt)
    if isinstance(k, bool) or not (symbolic or isinstance(k, numbers.Integral)):
        raise TypeError(f"k is {described(k)}; expected an integer")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; expected an integer in [1, {n}], the number of points")
    number: int = k if symbolic else operator.index(k)
    return number
