"""How one row is measured: every candidate checked, then timed round by round beside the others and a plain GEMM.

A round runs each once: the GEMMs, the peers, robustft (A B C, A B C, ...), so that whatever else the machine does
meets all of them alike. The first calls are not timed. Rounds fill a few seconds, and are at least three.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from . import memory
from .work import Candidate, Row, Work

TOLERANCE = {("float32", "highest"): 1e-3, ("float32", "high"): 5e-3, ("bfloat16", "highest"): 0.05}
"""Relative error against the float32 reference that a result may have, by dtype and precision."""
MATRICES = 16
"""N x K float32 matrices that must fit for a row to be checked at its own size; else it is at CHECKED samples."""
CHECKED = 2048
CALLS, SHORT = 200, 2e-3
"""A run is of so many calls, one after the other, that it takes about SHORT seconds; of CALLS at most. What a call of
microseconds takes is not to be what it takes with the caches that a matrix product left."""
LONG = 5.0
"""Seconds from which on a run needs no warming up."""


class Limits(NamedTuple):
    """Seconds of timed rounds for a row, seconds that one run may take at least, and the number of rounds."""

    row: float
    run: float
    fewest: int = 3
    most: int = 40


FULL, QUICK = Limits(row=6.0, run=30.0), Limits(row=1.0, run=2.0)


class WrongResult(AssertionError):
    """A candidate computes something else than the reference."""


class Gemm(NamedTuple):
    """Product of (side, 512) by (512, side) in one dtype, as a yardstick.

    `peak` is a rate that it hardly exceeds, in flops a second: one thread's best times their number. Threads that wait
    for each other on a busy machine would make it look as if nothing could be measured there.
    """

    run: Callable[[], Any]
    flops: float
    peak: float


@cache
def gemm(dtype: str, threads: int) -> Gemm:
    """Of a side of 2048, or of 128 where that product would take long (bfloat16 on CPUs without it)."""
    torch.set_num_threads(1)
    for side in (128, 2048):
        a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((side, 512), (512, side)))
        run, flops = partial(torch.mm, a, b), 2 * side * side * 512
        seconds = fastest(run)
        if seconds > 0.005:
            break
    torch.set_num_threads(threads)
    return Gemm(run, flops, threads * flops / seconds)


def timed(run: Callable[..., Any], *inputs: Any) -> float:
    start = time.perf_counter()
    run(*inputs)
    return time.perf_counter() - start


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the best run in a second's time: what the machine can do when nothing else is at work on it."""
    run()
    taken = [timed(run)]
    while sum(taken) < 1.0:
        taken.append(timed(run))
    return min(taken)


def measure(work: Work, row: Row, threads: int, limits: Limits, benchmark: Any) -> dict[str, Any]:
    """The record of a row; `benchmark` is pytest-benchmark's fixture, which times robustft."""
    record = {"name": str(row), "row": asdict(row), "threads": threads, "formula": work.formula}
    record["load"] = os.getloadavg()[0]
    products = {dtype: gemm(dtype, threads) for dtype in ("float32", "bfloat16")}
    rates = {dtype: product.peak for dtype, product in products.items()}
    found = {c.name: c for c in work.candidates(row)}
    missing = {c.name: why for c in found.values() if (why := c.missing or _too_much(c, work, row, rates, limits))}
    if missing.get("robustft"):
        benchmark.pedantic(lambda: None)
        return record | {"candidates": {name: {"missing": why} for name, why in missing.items()}}

    inputs = work.inputs(row)
    errors, warm = {}, {}
    checked = row if row.n <= CHECKED or _holds(row, MATRICES) else replace(row, n=CHECKED)
    oracle = work.reference(*work.inputs(checked))
    for name in [name for name in found if name not in missing]:
        try:
            errors[name] = check(work, found[name], checked, oracle)
            quick = found[name].prepares or work.flops(row) / rates[found[name].gemm] < LONG
            warm[name] = timed(found[name].run, *inputs) if quick else work.flops(row) / rates[found[name].gemm]
        except WrongResult:
            raise
        except Exception as error:  # a peer that fails is no reason to lose the row
            if name.startswith("robustft"):
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    present = [name for name in found if name not in missing]
    calls = {name: max(1, min(CALLS, int(SHORT / max(warm[name], 1e-9)))) for name in present}
    round_seconds = sum(p.flops / rates[dtype] for dtype, p in products.items()) + sum(
        calls[name] * warm[name] for name in present
    )
    seconds = race(products, {n: found[n] for n in present}, inputs, round_seconds, limits, benchmark, calls)

    rate = {dtype: p.flops / sorted(seconds[dtype])[len(seconds[dtype]) // 2] for dtype, p in products.items()}
    record |= {"gemm": {k: float(f"{v:.4g}") for k, v in rate.items()}, "flops": work.flops(row), "candidates": {}}
    for name in found:
        if name in missing:
            record["candidates"][name] = {"missing": missing[name]}
            continue
        took = {"seconds": [float(f"{t:.5g}") for t in seconds[name]], "error": errors[name]}
        record["candidates"][name] = took | memory.measure(row, name, threads)
    benchmark.extra_info.update(record)
    return record


def race(
    products: dict[str, Gemm],
    candidates: dict[str, Candidate],
    inputs: tuple[Any, ...],
    round_seconds: float,
    limits: Limits,
    benchmark: Any,
    calls: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Seconds a call in every round, by candidate, and by dtype of the GEMMs; a round has `calls` of each, else one."""
    seconds: dict[str, list[float]] = {name: [] for name in (*products, *candidates)}
    rounds = max(limits.fewest, min(limits.most, int(limits.row / max(round_seconds, 1e-3))))
    peers = [c for c in candidates.values() if c.name != "robustft"]

    def repeated(candidate: Candidate) -> Callable[..., None]:
        def run(*inputs: Any) -> None:
            for _ in range(calls.get(candidate.name, 1)):
                candidate.run(*inputs)

        return run

    def others() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for dtype, product in products.items():
            seconds[dtype].append(timed(product.run))
        for candidate in peers:
            seconds[candidate.name].append(timed(repeated(candidate), *inputs) / calls.get(candidate.name, 1))
        return inputs, {}

    own = repeated(candidates["robustft"])
    benchmark.pedantic(own, setup=others, rounds=rounds, iterations=1, warmup_rounds=0)
    seconds["robustft"] = [taken / calls.get("robustft", 1) for taken in benchmark.stats.stats.data]
    return seconds


def check(work: Work, candidate: Candidate, row: Row, oracle: tuple[torch.Tensor, ...]) -> float:
    """The candidate's error on a row; raises WrongResult beyond its tolerance."""
    error = work.error(candidate.run(*work.inputs(row)), oracle)
    tolerance = TOLERANCE[row.dtype, row.precision] if candidate.tolerance is None else candidate.tolerance
    if not error <= tolerance:
        raise WrongResult(f"{candidate.name} on {row}: relative error {error:.1e}, expected at most {tolerance:g}")
    return error


def _too_much(candidate: Candidate, work: Work, row: Row, rates: dict[str, float], limits: Limits) -> str:
    least = work.flops(row) / rates[candidate.gemm]
    if least > limits.run:
        return f"not measured: takes {least:,.0f} s or more here"
    if not _holds(row, candidate.matrices):
        return f"not measured: takes about {candidate.matrices * _matrix(row) / 1e9:,.0f} GB"
    return ""


def _holds(row: Row, matrices: float) -> bool:
    """Whether that many matrices fit into half of the memory that is free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return matrices * _matrix(row) <= free / 2


def _matrix(row: Row) -> float:
    return 4.0 * row.n * (row.k or row.n)
