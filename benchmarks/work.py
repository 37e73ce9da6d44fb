"""What a benchmark is made of: a row (work, shape, dtype, precision), its inputs, and the candidates that compute it.

Every `bench_<work>.py` holds one `WORK`: planted inputs, the formula as a user would write it, robustft's function and
its peers. Inputs are unit rows with a planted margin, as a trained CLIP gives them: image i lies near text i, a sample
near its class, a query near some points.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from robustft import functional

SCALE = 50.0
Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One line of the results: `n` samples (pairs, queries), `d` dimensions, `k` classes (points, groups), 0 for none.

    `precision` is robustft's `torch.set_float32_matmul_precision`; peers run at "highest".
    """

    work: str
    n: int
    d: int = 512
    k: int = 0
    dtype: str = "float32"
    precision: str = "highest"

    def __str__(self) -> str:
        shape = f"N={self.n}" + (f" K={self.k}" if self.k else "") + (f" D={self.d}" if self.d else "")
        precision = f" {self.precision}" if self.dtype == "float32" else ""
        return f"{self.work} {shape} {self.dtype}{precision}"


class Candidate(NamedTuple):
    """One way to compute a row.

    Attributes:
        name: "robustft", "eager", ...
        run: takes the row's inputs, gives the tensors that are compared: values, then gradients. None if missing.
        missing: why there is none.
        gemm: dtype of its matrix products, which bounds its time from below.
        matrices: how many N x K (N x N without classes) float32 matrices it holds at once, about.
        tolerance: relative error allowed, None for the dtype's own.
        prepares: whether its first call does something that later ones do not.
    """

    name: str
    run: Run | None
    missing: str = ""
    gemm: str = "float32"
    matrices: float = 0.0
    tolerance: float | None = None
    prepares: bool = False


def relative_error(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the tensors' errors |a - b| / |b|; indices are not compared, for ties may be broken either way."""
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        for a, b in zip(result, expected, strict=True)
        if b.dtype.is_floating_point
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


@dataclass(frozen=True)
class Work:
    """A function under measurement.

    Attributes:
        name: of `bench_<name>.py`.
        rows: of a full run: the bar's, and sweeps. quick: the rows of a quick one.
        inputs: of a row. candidates: of a row, robustft's own first.
        reference: the oracle, on the same inputs.
        flops: the least multiply-adds of a row, times two; 0 where memory is the limit. formula: how they are counted.
        error: of a candidate's result against the oracle's.
    """

    name: str
    rows: tuple[Row, ...]
    quick: tuple[Row, ...]
    inputs: Callable[[Row], tuple[Any, ...]]
    candidates: Callable[[Row], list[Candidate]]
    reference: Run
    flops: Callable[[Row], float]
    formula: str
    error: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], float] = relative_error


@contextmanager
def matmul_precision(name: str):
    """`torch.set_float32_matmul_precision(name)` inside a `with` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward_backward(loss: Callable[..., Tensor]) -> Run:
    """A run of a scalar loss: (value, gradient of each input that wants one)."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        value = loss(*inputs)
        wanted = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
        return value.detach(), *torch.autograd.grad(value, wanted)

    return run


def forward(function: Callable[..., Any]) -> Run:
    """A run without gradients of a function that gives a tensor or a tuple of them."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            result = function(*inputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return run


def ours(function: str, row: Row, run: Callable[[Callable[..., Any]], Run], name: str = "robustft") -> Candidate:
    """robustft's candidate: `run` of `functional.<function>` at the row's precision, missing where there is none."""
    public = getattr(functional, function, None)
    if public is None:
        return Candidate(name, None, f"this robustft has no functional.{function}")
    bare = run(public)

    def at_precision(*inputs: Any) -> tuple[Tensor, ...]:
        if torch.get_float32_matmul_precision() == row.precision:
            return bare(*inputs)  # as peers run: to set it takes as long as a small operation
        with matmul_precision(row.precision):
            return bare(*inputs)

    return Candidate(name, at_precision)


def panel(function: str, row: Row, run: Callable[[Callable[..., Any]], Run]) -> Candidate:
    """robustft's candidate with `memory=0`: nothing of the size of the logits is kept."""
    name = "robustft panel"
    public = getattr(functional, function, None)
    if public is None or "memory" not in inspect.signature(public).parameters:
        return Candidate(name, None, f"this robustft's {function} has no memory=")
    return ours(function, row, lambda f: run(lambda *inputs, **options: f(*inputs, memory=0, **options)), name)


def peer(
    name: str, row: Row, run: Run, *, matrices: float = 0.0, missing: str = "", prepares: bool = False
) -> Candidate:
    """A candidate that computes in the row's dtype. In bfloat16 its logits are rounded, and it may be that far off."""
    tolerance = 0.5 if row.dtype == "bfloat16" else None
    return Candidate(name, None if missing else run, missing, row.dtype, matrices, tolerance, prepares)


def compiled(loss: Callable[..., Any], row: Row, wrap: Callable[..., Run] = forward_backward, **options) -> Candidate:
    """`torch.compile` of the eager formula."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    return peer("torch.compile", row, wrap(torch.compile(loss, dynamic=False)), prepares=True, **options)


def unit_rows(generator: torch.Generator, n: int, d: int) -> Tensor:
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def generator(row: Row) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * row.n + 1009 * row.k + row.d)


def pairs(rng: torch.Generator, n: int, d: int, noise: float = 5.0) -> tuple[Tensor, Tensor]:
    """(n, d) image and text features; at the noise of 5 pairs have a cosine near .2, and some are not the nearest."""
    x = unit_rows(rng, n, d)
    return x, normalize(x + noise * unit_rows(rng, n, d), dim=1)


def class_samples(rng: torch.Generator, n: int, k: int, d: int, noise: float = 7.0) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d) features, (k, d) class embeddings, (n,) labels; some samples are misranked."""
    w = unit_rows(rng, k, d)
    y = torch.randint(k, (n,), generator=rng)
    return normalize(w[y] + noise * unit_rows(rng, n, d), dim=1), w, y


def leaf(tensor: Tensor, row: Row) -> Tensor:
    """In the row's dtype, wanting a gradient."""
    return tensor.to(getattr(torch, row.dtype)).requires_grad_()


def scale() -> Tensor:
    """The multiplied-out logit scale, float32 and trained, as in open_clip."""
    return torch.tensor(SCALE, requires_grad=True)
