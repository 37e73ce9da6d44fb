"""How an operator that csrc/ops.cpp declares gets a body, a fake kernel and an autograd formula in Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

library = torch.library.Library("robustft", "FRAGMENT")
_direct: dict[str, type[torch.autograd.Function]] = {}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_gradient(scale: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """ds of the scale's shape and dtype, from pairs of per-sample gradients and derivatives by the scale."""
    return sum((g * by_scale).sum() for g, by_scale in pairs).to(scale.dtype).reshape(scale.shape)


def both(g: Tensor | None, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of two losses of which one may not have been used."""
    return (torch.zeros_like(h) if g is None else g), (torch.zeros_like(g) if h is None else h)


def contiguous_like(tensor: Tensor) -> Tensor:
    """An empty tensor of its shape and dtype, as kernels return them, for fakes."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def fake(name: str, function: Callable) -> None:
    """Shapes and dtypes of an operator's results, for tracing."""
    torch.library.register_fake(f"robustft::{name}", function, lib=library)


def composite(name: str, body: Callable | None, fake_body: Callable) -> None:
    """A body in Python that serves every device, below autograd; None stands in csrc."""
    if body is not None:
        library.impl(name, body, "CompositeExplicitAutograd")
    fake(name, fake_body)


def autograd(name: str, setup: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"robustft::{name}", backward, setup_context=setup, lib=library)


def differentiable(
    name: str,
    forward: tuple[Callable | None, Callable],
    autograd_formula: tuple[Callable, Callable],
    gradient: tuple[Callable | None, Callable],
) -> None:
    """`name` and `name`_backward: (body, fake) of each, and (setup, backward) of the first one's autograd.

    A body of None stands in csrc. The gradient is an operator of its own, so that torch.compile sees it; it refuses
    to be differentiated.
    """
    for operator, (body, fake_body) in ((name, forward), (f"{name}_backward", gradient)):
        composite(operator, body, fake_body)
    autograd(name, *autograd_formula)
    _direct[name] = _direct_function(name, *autograd_formula)
    autograd(f"{name}_backward", lambda ctx, inputs, output: None, _no_second_derivative)


def call(name: str, *inputs):
    """The operator `name`, called the way that costs least: in eager mode around register_autograd's Python kernel.

    That kernel takes longer than a loss on 512 numbers. The formula is the same one, so nothing else changes.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.robustft, name)(*inputs)
    return _direct[name].apply(*inputs)


def _direct_function(name: str, setup: Callable, backward: Callable) -> type[torch.autograd.Function]:
    operator = getattr(torch.ops.robustft, name).default

    def forward(ctx, *inputs):
        output = operator(*inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "robustft: the gradient of a fused loss cannot be differentiated again; robustft.backend('reference') can"
    )
