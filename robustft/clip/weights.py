"""Arithmetic of weights, and their fingerprint.

theta = (1 - a) theta_zs + a theta_ft       WiSE-FT
theta = mean of theta_m                     soups
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.computation import check_same_computation
from robustft.clip.encoding import unwrap
from robustft.clip.messages import few
from robustft.ops.kinds import checked, described


@checked
def interpolate(zero_shot: nn.Module, fine_tuned: nn.Module, alpha: float) -> nn.Module:
    """WiSE-FT (arXiv 2109.01903, section 3): a model with weights (1 - alpha) zero_shot + alpha fine_tuned.

    It is a copy of `fine_tuned` (device, mode, requires_grad) with the state of `interpolate_state`. ValueError,
    naming the setting, for models that compute different things with their weights (GELU and QuickGELU, say).
    """
    fine_tuned = unwrap(fine_tuned)
    state = interpolate_state(unwrap(zero_shot).state_dict(), fine_tuned.state_dict(), alpha)
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
