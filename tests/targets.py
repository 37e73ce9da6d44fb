"""What computes, and on which tensors, in the tests that every body of an operator shares.

The compiled code of this process' devices: the CPU's, and a GPU's where there is one; or, in a process under
TRITON_INTERPRET=1 (tests/ops/test_triton.py starts one), the Triton kernels, interpreted, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import robustft
from robustft.ops import accelerator, reference


class Target(NamedTuple):
    """A backend, the device of its tensors, their dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    @property
    def by_triton(self) -> bool:
        return self.backend == "triton"

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


def targets() -> list[Target]:
    if accelerator.INTERPRETED:  # its products of bfloat16 are wrong
        return [Target("triton", "cpu", dtype) for dtype in (torch.float32, torch.float16)]
    every = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found = [Target("native", "cpu", dtype) for dtype in every]
    if torch.cuda.is_available():
        found += [Target("triton", "cuda", dtype) for dtype in accelerator.DTYPES]
    return found


TARGETS = targets()
FLOAT32 = [target for target in TARGETS if target.dtype == torch.float32]
INTERPRETED = accelerator.INTERPRETED
REFERENCE = [] if INTERPRETED else [Target("reference", "cpu", torch.float64)]
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_device = pytest.mark.parametrize("target", FLOAT32, ids=str)
each_body = pytest.mark.parametrize("target", [*FLOAT32, *REFERENCE], ids=str)


def placed(target: Target, *tensors: Tensor) -> list[Tensor]:
    """On the target's device, numbers in its dtype."""
    return [a.to(target.device, target.dtype) if a.is_floating_point() else a.to(target.device) for a in tensors]


def sizes(compiled: list, interpreted: list) -> list:
    """The interpreter takes about 10 ms for what a GPU takes a nanosecond: it gets sizes of its own."""
    return interpreted if INTERPRETED else compiled


def exhaustive(*values: object) -> list:
    """Parameters whose tests only `pytest -m exhaustive` runs: those beside them stand for them day by day."""
    each = [value if type(value) is tuple else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.exhaustive) for value in each]


@contextmanager
def case(*what: object) -> Iterator[None]:
    """One of the cases over which a test loops: begun with the seed of a test, named where it fails."""
    torch.manual_seed(0)
    try:
        yield
    except Exception as error:
        raise AssertionError(f"case {what}: {type(error).__name__}: {error}") from error


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    """The function's summed outputs' value and gradient by each input, in float64."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    out = function(*leaves)
    value = out if isinstance(out, Tensor) else sum((k + 1) * term for k, term in enumerate(out))
    value.backward()
    return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def assert_as_accurate_as_eager(function, *inputs: Tensor, target: Target) -> None:
    """For the value and each gradient: error <= 3 x the error of eager in the same dtype + 1e-6 of its largest entry.

    A float32 product of unit vectors is uncertain by about 1e-7 however it is computed, and s = 100 magnifies that in
    what cancels; hence also an absolute 1e-6. Against float64 eager on the same rounded inputs. Eager is the
    reference, which widens half precision; of a GPU's kernels, which multiply in half precision, eager that does so
    too.
    """
    dtype = target.dtype
    rounded = [i.to(target.device, dtype) for i in inputs]
    with robustft.backend(target.backend):
        ours = gradients(function, *rounded)
    with robustft.backend("reference"), pytest.MonkeyPatch.context() as patch:
        exact = gradients(function, *(i.double() for i in rounded))
        if target.by_triton:
            patch.setattr(reference, "at_least_float32", lambda tensor: tensor)
        eager = exact if dtype == torch.float64 else gradients(function, *rounded)
    unit = 1e-13 if dtype == torch.float64 else 1e-6
    for a, b, c in zip(ours, exact, eager, strict=True):
        assert (a - b).abs().max() <= 3 * (c - b).abs().max() + unit * (1 + b.abs().max())
