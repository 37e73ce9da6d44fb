"""Peak memory and time of a contrastive loss, forward and backward: robustft against open_clip and eager PyTorch.

Each measurement is a process of its own: the peak resident set over a run, less the resident set before it. The time
is that of the same single run, after a small one that starts the threads; take it as an order of magnitude.

    python -m benchmarks.memory                 # writes results/memory.json and the README's table
    python -m benchmarks.memory --table         # the README's table alone, from results/memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from benchmarks import machine

SIZES = (2048, 4096, 8192, 16384)
IMPLEMENTATIONS = ("robustft", "open_clip", "robustft with teacher", "eager with teacher")
LARGEST = {"eager with teacher": 8192}  # it takes 14 GB at 16384
README = Path(__file__).parent.parent / "README.md"


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
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would be used again, and not be counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before, start = status("VmRSS"), time.perf_counter()
    loss(x, t, s).backward()
    return {"bytes": status("VmHWM") - before, "seconds": time.perf_counter() - start}


def measure_all() -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        for name in (name for name in IMPLEMENTATIONS if n <= LARGEST.get(name, n)):
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name, str(n), "512"]
            run = subprocess.run(command, capture_output=True, text=True)
            row = {"implementation": name, "n": n, "d": 512, "dtype": "float32"}
            row |= json.loads(run.stdout) if run.returncode == 0 else {"error": run.stderr.strip().splitlines()[-1:]}
            rows.append(row)
            taken = f"{row['bytes'] / 1e6:8.0f} MB {row['seconds']:7.2f} s" if "bytes" in row else "failed"
            print(f"{name:24} N={n:6} {taken}", flush=True)
    return rows


def table(measured: dict[str, Any]) -> str:
    """results/memory.json as a Markdown table of peak MB, and the machine."""
    cells = {(row["n"], row["implementation"]): row for row in measured["results"]}
    lines = ["| N | " + " | ".join(IMPLEMENTATIONS) + " |", "|---:|" + "---:|" * len(IMPLEMENTATIONS)]
    for n in sorted({n for n, _ in cells}):
        rows = [cells.get((n, name), {}) for name in IMPLEMENTATIONS]
        taken = [
            f"{row['bytes'] / 1e6:,.0f} MB" if "bytes" in row else "failed" if "error" in row else "not measured"
            for row in rows
        ]
        lines.append(f"| {n:,} | " + " | ".join(taken) + " |")
    where = measured["machine"]
    threads = f"{where['threads']} thread" + ("s" if where["threads"] > 1 else "")
    return "\n".join([*lines, "", f"{where['cpu']} ({where['isa']}), {threads}, torch {where['torch']}.", ""])


def write_table() -> None:
    """Puts the table of results/memory.json between the README's two memory comments."""
    text = table(json.loads((machine.RESULTS / "memory.json").read_text()))
    pattern = r"(<!-- memory -->\n).*?(<!-- end of memory -->)"
    readme, count = re.subn(pattern, lambda m: m[1] + text + m[2], README.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{README} has {count} places between <!-- memory --> and <!-- end of memory -->; expected 1")
    README.write_text(readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("NAME", "N", "D"), help="measure one in this process, print JSON")
    parser.add_argument("--table", action="store_true", help="only write the README's table, from the stored results")
    options = parser.parse_args()
    if options.one:
        name, n, d = options.one
        print(json.dumps(measure(name, int(n), int(d))))
        return
    if not options.table:
        print(machine.write("memory", "python -m benchmarks.memory", measure_all()))
    write_table()


if __name__ == "__main__":
    main()
