"""Arithmetic of weights, and their fingerprint.

theta = (1 - a) theta_zs + a theta_ft       WiSE-FT
theta = mean of theta_m                     soups; between it and theta_zs by their angles, Model Stock
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.adapters import merged
from robustft.clip.computation import check_same_computation
from robustft.clip.encoding import unwrap
from robustft.clip.messages import few
from robustft.ops.kinds import checked, described


@checked
def interpolate(zero_shot: nn.Module, fine_tuned: nn.Module, alpha: float) -> nn.Module:
    """WiSE-FT (arXiv 2109.01903, section 3): a model with weights (1 - alpha) zero_shot + alpha fine_tuned.

    It is a copy of `fine_tuned` (device, mode, requires_grad) with the state of `interpolate_state`; adapters in either
    are merged first. ValueError, naming the setting, for models that compute different things with their weights
    (GELU and QuickGELU, say).
    """
    zero_shot, fine_tuned = merged(zero_shot), merged(fine_tuned)
    state = interpolate_state(zero_shot.state_dict(), fine_tuned.state_dict(), alpha)
    check_same_computation(zero_shot, fine_tuned, "zero_shot", "fine_tuned")
    model = copy.deepcopy(fine_tuned)
    model.load_state_dict(state)
    return model


@checked
def interpolate_state(
    zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) zero_shot + alpha fine_tuned, entry by entry, as new tensors on fine_tuned's devices.

    Floating-point entries, buffers too, are interpolated in at least float32; integer ones are fine_tuned's.
    Entries equal in both stay as they are, and alpha 0 and 1 give the two states back, bit for bit. No
    gradient. Raises ValueError when alpha is outside [0, 1], or keys, shapes or dtypes differ, naming them.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    _check_match(zero_shot, fine_tuned, "zero_shot", "fine_tuned")

    def mix(zs: Tensor, ft: Tensor) -> Tensor:
        if alpha in (0, 1) or not ft.is_floating_point():
            return (zs.to(ft.device) if alpha == 0 else ft).detach().clone()
        wide = torch.promote_types(ft.dtype, torch.float32)
        # lerp, unlike the two products, returns x for lerp(x, x, alpha): frozen weights stay as they are.
        return torch.lerp(zs.detach().to(ft.device, wide), ft.detach().to(wide), float(alpha)).to(ft.dtype)

    return {key: mix(zero_shot[key], ft) for key, ft in fine_tuned.items()}


@checked
def interpolate_entries(
    zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> dict[str, Tensor]:
    """`interpolate_state` with an alpha of its own for each entry; ValueError where one is missing."""
    _check_match(zero_shot, fine_tuned, "zero_shot", "fine_tuned")
    if missing := [key for key in fine_tuned if key not in alphas]:
        raise ValueError(f"alphas: {few(missing, 'no value for')}")
    return {
        key: interpolate_state({key: zero_shot[key]}, {key: ft}, alphas[key])[key] for key, ft in fine_tuned.items()
    }


@checked
def stock_state(zero_shot: Mapping[str, Tensor], fine_tuned: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Model Stock (arXiv 2403.19522): each entry as near to the centre of its fine-tunings as their angles say.

    With cos the mean cosine of the pairs of w_i - w_0 and k fine-tunings, t = k cos / ((k - 1) cos + 1) and the entry
    is (1 - t) w_0 + t mean_i w_i: their mean where all moved alike, w_0 where they moved at right angles or, which the
    paper leaves open, against each other. Computed in float64, entry by entry; new tensors on the first's devices;
    integer entries are the first fine-tuning's, and entries that no run moved stay as they are. ValueError for fewer
    than two fine-tunings, or keys, shapes or dtypes that differ, naming them.
    """
    if len(fine_tuned) < 2:
        raise ValueError(f"fine_tuned: expected at least two states, which have an angle, got {len(fine_tuned)}")
    for place, state in enumerate(fine_tuned):
        _check_match(zero_shot, _state(state, place), "zero_shot", f"fine_tuned[{place}]")

    def entry(key: str) -> Tensor:
        first = fine_tuned[0][key]
        if not first.is_floating_point():
            return first.detach().clone()
        start = zero_shot[key].detach().to(first.device)
        moves = [state[key].detach().to(first.device).double() - start.double() for state in fine_tuned]
        pairs = [(a * b).sum() / (a.norm() * b.norm()) for a, b in itertools.combinations(moves, 2)]
        cosine = torch.stack(pairs).nan_to_num(0.0).mean().clamp(0.0, 1.0)
        ratio = len(moves) * cosine / ((len(moves) - 1) * cosine + 1)
        return (start.double() + ratio * torch.stack(moves).mean(0)).to(first.dtype)

    return {key: entry(key) for key in fine_tuned[0]}


@checked
def average_states(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the states of models of one architecture, as new tensors on the first's devices.

    Floating-point entries, buffers too, are averaged in at least float32; integer ones are the first's. Entries equal
    in all stay as they are, bit for bit. No gradient. One state is held at a time beside the mean. Raises ValueError
    when there is none, or keys, shapes or dtypes differ, naming them.
    """
    states = (_state(state, place) for place, state in enumerate(states))
    first = next(states, None)
    if first is None:
        raise ValueError("states: expected at least one")
    first = dict(first)
    wide = {key: torch.promote_types(x.dtype, torch.float32) for key, x in first.items() if x.is_floating_point()}
    means = {key: first[key].detach().to(dtype, copy=True) for key, dtype in wide.items()}
    for n, state in enumerate(states, start=2):
        _check_match(first, state, "the first state", f"state {n}")
        for key, mean in means.items():
            mean.lerp_(state[key].detach().to(mean), 1.0 / n)  # of equals lerp is exact
    return {key: means[key].to(x.dtype) if key in means else x.detach().clone() for key, x in first.items()}


def _state(state: Any, place: int) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"states[{place}] is {described(state)}; expected a mapping of names to tensors")
    return state


def _check_match(a: Mapping[str, Tensor], b: Mapping[str, Tensor], a_name: str, b_name: str) -> None:
    """Raises ValueError naming the keys, shapes and dtypes in which two states differ."""
    differences = (
        few([key for key in a if key not in b], f"keys only in {a_name}"),
        few([key for key in b if key not in a], f"keys only in {b_name}"),
        few(
            [
                f"{key} {tuple(a[key].shape)} {a[key].dtype} and {tuple(x.shape)} {x.dtype}"
                for key, x in b.items()
                if key in a and (a[key].shape, a[key].dtype) != (x.shape, x.dtype)
            ],
            "different shapes or dtypes",
        ),
    )
    if any(differences):
        raise ValueError(f"{a_name} and {b_name} do not match: {'; '.join(filter(None, differences))}")


@checked
def half_precision_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that are trained and are float16 or bfloat16."""
    half = (torch.float16, torch.bfloat16)
    return [name for name, value in module.named_parameters() if value.requires_grad and value.dtype in half]


@checked
def check_trainable_precision(module: nn.Module) -> None:
    """Raises ValueError, naming them, where parameters in half precision are trained without float32 masters.

    A bfloat16 weight has 8 significant bits: at a learning rate of 1e-5 one Adam update in twenty-five changes it, the
    others are rounded away.
    """
    if names := half_precision_parameters(module):
        dtypes = sorted({str(dict(module.named_parameters())[name].dtype) for name in names})
        raise ValueError(
            f"{few(names, 'trained parameters')} are {' and '.join(dtypes)}: most updates of a fine-tuning are smaller "
            "than what these can hold and are rounded away. Load the model in float32 (model.float()) and train under "
            'autocast, precision="bf16"; parameters that only evaluate need requires_grad_(False)'
        )


@checked
def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a model's state (names, shapes, dtypes, bytes), module types and settings.

    Equal for copies of a model, whatever their device and mode. Types and settings (public attributes that are plain
    numbers, strings or sequences of them: the number of heads, a stride, an epsilon) tell apart models of equal weights
    that compute different features. Memory: one tensor at a time on the CPU.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = [(key, value) for key, value in sorted(vars(module).items()) if _is_setting(key, value)]
        digest.update(f"{name}:{type(module).__name__}:{settings}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_setting(name: str, value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    plain = all(isinstance(v, (bool, int, float, str)) for v in values)
    # The images' statistics, which open_clip leaves on the tower, tell how to prepare images, not what is computed.
    return plain and name not in {"training", "image_mean", "image_std"} and not name.startswith("_")
