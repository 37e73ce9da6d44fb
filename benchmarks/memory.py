"""Peak memory and time of a contrastive loss, forward and backward: robustft against open_clip and eager PyTorch.

Each measurement is a process of its own: the peak resident set over a run, less the resident set before it. The time
is that of the same single run, after a small one that starts the threads; take it as an order of magnitude.

    python -m benchmarks.memory                 # writes results/memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from torch.nn.functional import normalize

from benchmarks import machine

SIZES = (2048, 4096, 8192, 16384)
IMPLEMENTATIONS = ("robustft", "open_clip", "robustft with teacher", "eager with teacher")


def objective(implementation: str):
    from robustft import functional as rf
    from robustft.ops import reference

    match implementation:
        case "robustft":
            return rf.contrastive_loss
        case "open_clip":
            from open_clip.loss import ClipLoss

            return ClipLoss()
        case "robustft with teacher":
            return lambda x, t, s: sum(rf.contrastive_distillation_loss(x, t, s, x.detach(), t.detach(), 40.0))
        case "eager with teacher":

            def eager(x, t, s):
                teacher = (x.detach(), t.detach(), torch.tensor(40.0))
                terms = reference.contrastive_distillation_loss(x, t, s, *teacher, torch.arange(len(x)))
                return sum(term.mean() for term in terms)

            return eager
    raise ValueError(f"implementation is {implementation!r}; expected one of {IMPLEMENTATIONS}")


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def measure(implementation: str, n: int, d: int) -> dict[str, float]:
    """Bytes beyond the inputs (gradients included) and seconds of one forward and backward."""
    torch.manual_seed(0)
    x, t = (normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
    s = torch.tensor(50.0, requires_grad=True)
    loss = objective(implementation)
    loss(x[:512], t[:512], s).backward()
    x.grad = t.grad = s.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before, start = status("VmRSS"), time.perf_counter()
    loss(x, t, s).backward()
    return {"bytes": status("VmHWM") - before, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("NAME", "N", "D"), help="measure one in this process, print JSON")
    options = parser.parse_args()
    if options.one:
        name, n, d = options.one
        print(json.dumps(measure(name, int(n), int(d))))
        return
    rows = []
    for n in SIZES:
        for name in IMPLEMENTATIONS:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name, str(n), "512"]
            run = subprocess.run(command, capture_output=True, text=True)
            row = {"implementation": name, "n": n, "d": 512, "dtype": "float32"}
            row |= json.loads(run.stdout) if run.returncode == 0 else {"failed": run.stderr.strip().splitlines()[-1:]}
            rows.append(row)
            taken = f"{row['bytes'] / 1e6:8.0f} MB {row['seconds']:7.2f} s" if "bytes" in row else "failed"
            print(f"{name:24} N={n:6} {taken}", flush=True)
    print(machine.write("memory", "python -m benchmarks.memory", rows))


if __name__ == "__main__":
    main()
