"""Peak memory of a candidate, in a process of its own: the peak resident set over a run, less that before it.

The processes are forked from one that has imported everything and computed nothing, so that each starts alike.

    python -m benchmarks.memory                 # writes results/memory.json, prints its table
    python -m benchmarks.memory --table         # prints the table of what is stored
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from . import machine
from .work import Row

SIZES = (2048, 4096, 8192, 16384)
IMPLEMENTATIONS = {
    "robustft": ("contrastive", "robustft"),
    "robustft, memory=0": ("contrastive", "robustft panel"),
    "open_clip": ("contrastive", "open_clip"),
    "robustft with teacher": ("distillation", "robustft"),
    "with teacher, memory=0": ("distillation", "robustft panel"),
    "eager with teacher": ("distillation", "eager"),
}
LARGEST = {"eager with teacher": 8192}  # it takes 14 GB at 16384
WARM = 256
"""Samples of the run that starts the threads before the measured one."""


def measure(row: Row, candidate: str, threads: int) -> dict[str, Any]:
    """{"bytes": beyond the inputs, "extra_bytes": beyond inputs and results (gradients too)} or {"failed": why}."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "open_clip", "faiss", "robustft.pipeline.quickstart"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_here, args=(sender, row, candidate, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = {"failed": "the process was killed, probably for want of memory"}
    process.join()
    return result


def _measure_here(sender: Connection, row: Row, name: str, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        work = import_module(f".bench_{row.work}", __package__).WORK
        inputs, candidate = work.inputs(row), next(c for c in work.candidates(row) if c.name == name)
        if candidate.prepares:
            candidate.run(*inputs)
        else:
            candidate.run(*work.inputs(replace(row, n=min(row.n, WARM))))
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would be used again, and not be counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        results = candidate.run(*inputs)
        peak = max(0, _status("VmHWM") - before)
        sender.send({"bytes": peak, "extra_bytes": max(0, peak - sum(r.nbytes for r in results))})
    except Exception as error:  # whatever it is, the parent reports it
        sender.send({"failed": f"{type(error).__name__}: {error}"[:200]})


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure_all() -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        for name in (name for name in IMPLEMENTATIONS if n <= LARGEST.get(name, n)):
            work, candidate = IMPLEMENTATIONS[name]
            taken = measure(Row(work, n), candidate, torch.get_num_threads())
            rows.append({"implementation": name, "n": n, "d": 512, "dtype": "float32", **taken})
            print(f"{name:24} N={n:6} {_megabytes(taken)}", flush=True)
    return rows


def _megabytes(row: dict[str, Any]) -> str:
    return f"{row['bytes'] / 1e6:,.0f} MB" if "bytes" in row else "failed" if "failed" in row else "not measured"


def table(measured: dict[str, Any]) -> str:
    """results/memory.json as a Markdown table of peak MB, and the machine."""
    cells = {(row["n"], row["implementation"]): row for row in measured["results"]}
    lines = ["| N | " + " | ".join(IMPLEMENTATIONS) + " |", "|---:|" + "---:|" * len(IMPLEMENTATIONS)]
    for n in sorted({n for n, _ in cells}):
        lines.append(
            f"| {n:,} | " + " | ".join(_megabytes(cells.get((n, name), {})) for name in IMPLEMENTATIONS) + " |"
        )
    return "\n".join([*lines, "", machine.line(measured["machine"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only print the table of the stored results")
    if not parser.parse_args().table:
        print(machine.write("memory", "python -m benchmarks.memory", measure_all()))
    print(table(json.loads((machine.RESULTS / "memory.json").read_text())))


if __name__ == "__main__":
    main()
