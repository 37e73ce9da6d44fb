"""The two bodies of the contrastive losses on a GPU, by size: own kernels for the products, or the library's (cuBLAS).

    python -m benchmarks.gpu_bodies                  # prints a line of JSON for each case
    python -m benchmarks.gpu_bodies --only bfloat16  # cases whose name holds this

Of each case: milliseconds of the operators' forward and backward, called one after the other without waiting (medians
by CUDA events), those that the host takes to launch them, and those of each kernel by torch's profiler. Where the host
takes longer than the kernels, the first is the host's. gpu_model.py is held against these.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch

from benchmarks.gpu_rows import BF16, DEVICE, median, pairs, timed
from robustft.ops.triton import configs, contrastive

D = 512


class Case(NamedTuple):
    n: int
    dtype: torch.dtype
    precision: str
    teacher: bool
    keep: bool
    library: bool

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + (f" {self.precision}" if self.dtype == torch.float32 else "")
        more = [word for word, said in (("teacher", self.teacher), ("recomputed", not self.keep)) if said]
        return ", ".join([f"N = {self.n}", dtype, *more, "by the library" if self.library else "by own kernels"])


def cases() -> Iterator[Case]:
    for library in (False, True):
        for n in (1024, 2048, 4096, 8192, 16384, 32768):
            yield from (Case(n, BF16, "highest", teacher, True, library) for teacher in (False, True))
            yield Case(n, torch.float16, "highest", False, True, library)
        yield Case(32768, BF16, "highest", False, False, library)
        yield from (Case(n, torch.float32, "highest", False, True, library) for n in (512, 1024, 2048, 8192))
        yield from (Case(4096, torch.float32, precision, False, True, library) for precision in ("high", "medium"))


def measure(case: Case) -> dict[str, object]:
    torch.set_float32_matmul_precision(case.precision)
    x, t = (f.detach() for f in pairs(case.n, D, case.dtype))
    scale, g = torch.tensor(50.0, device=DEVICE), torch.full((case.n,), 1 / case.n, device=DEVICE)
    taught = (*(f.detach() for f in pairs(case.n, D, case.dtype, seed=7)), torch.tensor(40.0, device=DEVICE))

    def forward() -> tuple:
        if case.teacher:
            return contrastive.contrastive_distillation_loss(x, t, scale, *taught, None, case.keep)
        return contrastive.contrastive_loss(x, t, scale, None, 0.0, case.keep)

    def backward(out: tuple) -> tuple:
        if case.teacher:
            return contrastive.contrastive_distillation_loss_backward(g, g, x, t, scale, *taught, None, *out[2:])
        return contrastive.contrastive_loss_backward(g, x, t, scale, None, 0.0, *out[1:])

    with patch.object(configs, "by_library", lambda *_: case.library):
        out = forward()
        for _ in range(3):
            backward(out)
            out = forward()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        backward(out)
        end = time.perf_counter()
        torch.cuda.synchronize()
        host = [round(1e3 * (b - a), 3) for a, b in ((begin, middle), (middle, end))]
        found = {name: median([timed(run, 5) for _ in range(5)]) for name, run in
                 (("forward", forward), ("backward", lambda: backward(out)))}  # fmt: skip
        activity = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            backward(forward())
            torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    for event in profile.key_averages():
        name = event.key
        name = "library's products" if "nvjet" in name or "gemm" in name else "torch" if "at::" in name else name
        kernels[name] += event.self_device_time_total / 1e3
    return {
        "case": case.name,
        "milliseconds": {name: round(value, 4) for name, value in found.items()},
        "host": dict(zip(found, host, strict=True)),
        "kernels": {name: round(value, 4) for name, value in kernels.most_common() if value > 1e-3},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    only = parser.parse_args().only
    for case in cases():
        if only in case.name:
            print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
