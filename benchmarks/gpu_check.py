"""All that a GPU can tell, in one command and within minutes: build, tests, sanitizer, the bar's GPU rows.

    python -m benchmarks.gpu_check                # about ten minutes; --minutes 5 leaves out what does not fit
    python -m benchmarks.gpu_check --only rows    # some of: build, rates, tests, sanitizer, rows, host
    python -m benchmarks.gpu_check --list         # what is to be measured, as results/gpu.md has it; needs no GPU

Needs torch with CUDA, Triton, nvcc, CMake and pytest; neither open_clip nor a network. Each step is a process of its
own with a time limit, and results/<gpu>.json is rewritten after each, so that a step that hangs, crashes or is cut off
costs only itself. Times are medians over rounds in which ours and the peers take turns, by CUDA events; a row whose
result differs from the reference's is an error, not a time. The host's CPU rows are measured too where it has AMX.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from robustft.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
OTHER_DEMANDS = {"carot-step-512": "1.45 of a FLYP step", "contrastive-bf16-1M": "fits 80 GB"}
STEPS = ("build", "rates", "tests", "sanitizer", "rows", "host")


class Check:
    """The results so far, in memory and in the file, and the time that is left."""

    def __init__(self, path: Path | None, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes
        self.path = path
        self.results: dict[str, Any] = {"command": "python -m benchmarks.gpu_check"}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, step: str, result: Any) -> None:
        self.results[step] = result
        print(f"-- {step}: {json.dumps(result)[:2000]}", flush=True)
        if self.path is None:
            return
        write_json(self.path, self.results)

    def run(self, command: list[str], limit: float, **environment: str) -> dict[str, Any]:
        """{"seconds", "status", "output"}: status is the exit status, or "cut off" at the limit."""
        limit, start = min(limit, self.left()), time.monotonic()
        if limit < 5:
            return {"seconds": 0.0, "status": "no time left", "output": ""}
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1"} | environment
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            status: int | str = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, status = process.communicate()[0], "cut off"
        return {"seconds": round(time.monotonic() - start, 1), "status": status, "output": output}


def build(check: Check) -> None:
    run = check.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 240)
    say = "import robustft, json; print(json.dumps(robustft.build_info(), default=str))"
    info = check.run([sys.executable, "-c", say], 60)
    run["output"] = run["output"][-1500:] if run["status"] else ""
    try:
        run["info"] = json.loads(info["output"].splitlines()[-1])
    except (ValueError, IndexError):
        run["info"] = info["output"][-500:]
    check.keep("build", run)


class Part(NamedTuple):
    """Some of the GPU tests: a process of its own."""

    name: str
    suites: tuple[str, ...]
    selects: str


OF_DTYPE = {
    "float32": "cuda and float32",
    "bfloat16": "cuda and bfloat16",
    "float16": "cuda and float16 and not bfloat16",
}
BY_DTYPE = {
    "contrastive": ("test_contrastive", "not distillation"),
    "distillation": ("test_contrastive", "distillation"),
    "classification": ("test_class_losses", "classification_loss"),
    "dual risk": ("test_class_losses", "not classification_loss"),
    "execution of pairs": ("ops/test_execution", "(contrastive or distillation)"),
    "execution of classes": ("ops/test_execution", "not (contrastive or distillation)"),
}
"""Suites all of whose GPU tests name a dtype, and which of their tests."""
WHOLE = {
    "scores and risks": ("test_scores", "test_risks"),
    "cuda kernels": ("ops/test_cuda_kernels",),
    "neighbors": ("test_neighbors",),
    "offsets": ("ops/test_offsets",),  # the largest allocations, for which a card has room once
}


def parts() -> list[Part]:
    """Every GPU test in one of them, the most telling first. Compiling a suite's Triton kernels takes longer than
    running them, and a process compiles one at a time: so the suites are split."""
    split = [
        Part(f"{name}, {dtype}", (f"tests/{suite}.py",), f"{of_dtype} and {selects}")
        for name, (suite, selects) in BY_DTYPE.items()
        for dtype, of_dtype in OF_DTYPE.items()
    ]
    whole = [Part(name, tuple(f"tests/{suite}.py" for suite in suites), "cuda") for name, suites in WHOLE.items()]
    return split + whole


def outcome(run: dict[str, Any]) -> dict[str, Any]:
    """What a part's pytest said, how many tests passed even of one that was cut off, and where it was then."""
    lines = run.pop("output").splitlines()
    said = [re.search(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line) for line in lines]
    counts = Counter(match[2].lower() for match in said if match)
    run["counts"] = dict(counts)
    run["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    run["summary"] = next((line for line in reversed(lines) if re.search(r"passed|failed|error|no tests", line)), "")
    if run["status"] != 0:
        run["tail"] = lines[-60:]
    return run


def tests(check: Check) -> None:
    """The suites' GPU cases, as many processes at once as there are cores: they compile more than they compute, into
    one cache of Triton's. Each is kept as it ends. That a part has none is a failure too: pytest says so by its status.
    """
    done: dict[str, Any] = {}
    workers = max(1, min(len(parts()), os.cpu_count() or 1))
    deadline = time.monotonic() + min(240, check.left())

    def one(part: Part) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-v", "-m", "", "--maxfail=10", "-p", "no:cacheprovider"]
        limit = deadline - time.monotonic()
        return outcome(check.run([*command, "-k", part.selects, *part.suites], limit, OMP_NUM_THREADS="1"))

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(one, part): part.name for part in parts()}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            failed = [name for name, run in done.items() if run["status"] != 0]
            status = failed or (0 if len(done) == len(futures) else "unfinished")
            check.keep("tests", {"status": status, "parts": done})


def sanitizer(check: Check) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        check.keep("sanitizer", "not measured: no compute-sanitizer")
        return

    def one(kind: str) -> dict[str, Any]:
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_rows", "small"]
        run = check.run(command, 75)
        run["output"] = run["output"][-1500:] if run["status"] else run["output"][-200:]
        return run

    kinds = ("memcheck", "racecheck")
    with ThreadPoolExecutor(len(kinds)) as pool:
        found = dict(zip(kinds, pool.map(one, kinds), strict=True))
    check.keep("sanitizer", found)


def rows(check: Check) -> None:
    """Each row in its own process, the bar's first."""
    listed = check.run([sys.executable, "-m", "benchmarks.gpu_rows", "list"], 60)
    measured: dict[str, Any] = {}
    for name in listed["output"].split():
        run = check.run([sys.executable, "-m", "benchmarks.gpu_rows", name], 75)
        try:
            measured[name] = json.loads(run["output"].splitlines()[-1]) | {"seconds": run["seconds"]}
        except (ValueError, IndexError):
            measured[name] = {"status": run["status"], "output": run["output"][-1500:]}
        check.keep("rows", measured)


def rates(check: Check) -> None:
    run = check.run([sys.executable, "-m", "benchmarks.gpu_rows", "rates"], 60)
    try:
        check.keep("rates", json.loads(run["output"].splitlines()[-1]))
    except (ValueError, IndexError):
        check.keep("rates", run)


def host(check: Check) -> None:
    """The CPU's bar, where this host is what it was set for."""
    say = "import robustft; print(robustft.build_info()['active_isa'])"
    isa = check.run([sys.executable, "-c", say], 60)["output"].split()[-1:]
    if isa != ["amx"]:
        check.keep("host", f"not measured: the host's CPU runs {isa}")
        return
    output = str((check.path.parent if check.path else ROOT) / "host")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "2", "--output", output]
    run = check.run(command, max(30.0, check.left() - 5))
    run["output"] = run["output"][-6000:]
    check.keep("host", run)


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| row | ours | peers (time over ours) | bar | share of roofline |", "|---|---:|---|---|---:|"]
    for name, row in results.get("rows", {}).items():
        if "milliseconds" not in row:
            lines.append(f"| {name} | not measured | {row.get('status', row.get('output', ''))} | | |")
            continue
        times = dict(row["milliseconds"])
        ours = times.pop("robustft")
        peers = ", ".join(
            f"{peer} {t / ours:.2f}x" if isinstance(t, float) else f"{peer}: {t}" for peer, t in times.items()
        )
        share = f"{100 * row['share']:.0f} %" if row.get("share") else ""
        lines.append(f"| {name} | {ours:.3f} ms | {peers} | {row.get('verdict', '')} | {share} |")
    return "\n".join(lines) + "\n"


def unmeasured() -> str:
    """Every row and its bar, as long as no GPU has measured them."""
    from benchmarks.gpu_rows import ROWS

    lines = [
        "# GPU rows",
        "",
        "`python -m benchmarks.gpu_check` measures them beside their peers and writes `<gpu>.json` and `<gpu>.md` "
        "here; no GPU has run it yet. `python -m benchmarks.gpu_check --list` writes this file.",
        "",
        "| row | must | here |",
        "|---|---|---|",
    ]
    for name, (_, bar, _) in ROWS.items():
        demands = [OTHER_DEMANDS[name]] if name in OTHER_DEMANDS else []
        demands += [f"{bar.milliseconds:g} ms"] if bar.milliseconds is not None else []
        demands += [f"{bar.eager:g}x eager"] if bar.eager is not None else []
        demands += [f"{bar.peers:g}x every peer"] if bar.peers is not None else []
        lines.append(f"| {name} | {', '.join(demands)} | not measured |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="stop after this many")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="these steps alone")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="print the rows instead")
    options = parser.parse_args()
    if options.list:
        print(unmeasured())
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing is measured")
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = options.output or ROOT / "benchmarks" / "results"
    check = Check(folder / f"{name}.json", options.minutes)
    for step in (step for step in STEPS if step in options.only):
        globals()[step](check)
    text = table(check.results)
    write_text(folder / f"{name}.md", text)
    print(text)
    return 0 if "tests" not in options.only or check.results["tests"]["status"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
