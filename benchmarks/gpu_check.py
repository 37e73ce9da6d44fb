"""All that a GPU can tell, in one command and within minutes: build, values, the bar's GPU rows, tests, sanitizer.

    python -m benchmarks.gpu_check                # about ten minutes; --minutes 5 leaves out what does not fit
    python -m benchmarks.gpu_check --only rows    # some of: build, values, rates, rows, tests, sanitizer, profile,
                                                  # host, tune
    python -m benchmarks.gpu_check --list         # what is to be measured, as results/gpu.md has it; needs no GPU
    python -m benchmarks.gpu_check --rehearse     # where there is no GPU: every step, each of which says so

Needs torch with CUDA, Triton and pytest, and unless libraries of these sources are there, nvcc, CMake and pybind11;
neither open_clip nor a network. Peers that are installed are measured too: where there is a network, `pip download -d
peers --no-deps liger-kernel cut-cross-entropy inf-cl siglip-kernel`; there, `pip install --no-deps peers/*`. Each job
is a process of its own with a time limit, forked where nothing needs to be imported again, and results/<gpu>.json is
rewritten after each, so that a job that hangs, crashes or is cut off costs only itself, and of a row that is cut off
the rounds so far count. Times are medians over rounds in which ours and the peers take turns, by CUDA events, after a
first pass in which all rows compile side by side; a row whose result is wrong is an error, not a time. The host's CPU
rows are measured too where it has AMX. It ends with the three rows that are farthest behind what gpu_model.py predicts,
and with what ncu says of the farthest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any, NamedTuple

from robustft.files import write_json, write_text

NO_DEVICE = "no device"
"""What a job says, and ends with 1, where there is no GPU."""
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OTHER_DEMANDS = {"carot-step-512": "1.45 of a FLYP step", "contrastive-bf16-1M": "fits 80 GB"}
COMMAND = "python -m benchmarks.gpu_check"
STEPS = ("build", "values", "rates", "rows", "tests", "sanitizer", "profile", "host", "tune")
HEAVY = ("distillation-bf16-32768", "carot-step-512", "contrastive-bf16-1M")
"""Rows that are first run one after the other: together they would not fit the card."""
PROFILED = "contrastive-bf16-32768"
"""Unless another row is farther behind its prediction."""
TUNED = ("contrastive-bf16-2048", "classes-bf16-4096", "contrastive-bf16-512")
"""Rows whose products are own kernels', for the table of tiles."""
LOADED = ("torch", "triton", "robustft.functional", "robustft.neighbors", "torch._inductor.config")
"""What a forked job needs not import."""


class Job:
    """A child process, whose output goes to a file; killed with all of its own at the limit."""

    def __init__(self, pid: int, said: IO[str], limit: float) -> None:
        self.pid, self.said = pid, said
        self.start = time.monotonic()
        self.deadline = self.start + limit
        self.status: int | str | None = None
        self.seconds = 0.0

    def ended(self) -> bool:
        if self.status is None:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > self.deadline:
                os.killpg(self.pid, 9)
                os.waitpid(self.pid, 0)
                self.status = "cut off"
            self.seconds = round(time.monotonic() - self.start, 1)
        return self.status is not None

    def result(self) -> dict[str, Any]:
        """{"seconds", "status", "output"}: status is the exit status, "cut off" at the limit, or "no device"."""
        while not self.ended():
            time.sleep(0.02)
        self.said.seek(0)
        output = self.said.read()
        self.said.close()
        status = NO_DEVICE if self.status == 1 and output.rstrip().endswith(NO_DEVICE) else self.status
        return {"seconds": self.seconds, "status": status, "output": output}


class Check:
    """The results so far, in memory and in the file, and the time that is left."""

    forks = False
    """Whether a forked process can use the GPU; else every job imports torch for itself."""
    rehearsal = False
    """Whether there is no GPU, and nothing is to be built, measured or overwritten."""

    def __init__(self, path: Path | None, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes
        self.path = path
        self.results: dict[str, Any] = {"command": COMMAND}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, step: str, result: Any, news: Any = None) -> None:
        """Puts a step's result so far into the file; prints the news of it, else all."""
        self.results[step] = result
        said = json.dumps(result if news is None else news)
        print(f"-- {step}, {self.left():.0f} s left: {said[:1200]}", flush=True)
        if self.path is None:
            return
        write_json(self.path, self.results)

    def run(self, command: list[str], limit: float, **environment: str) -> dict[str, Any]:
        """What a program said, and how it ended: `Job.result`."""
        limit = min(limit, self.left())
        if limit < 5:
            return {"seconds": 0.0, "status": "no time left", "output": ""}
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
        env |= {"PYTHONUNBUFFERED": "1"} | environment
        said = tempfile.TemporaryFile("w+", errors="replace")
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        result = Job(process.pid, said, limit).result()
        process.returncode = 0  # waited for by its number
        return result

    def rows(self, arguments: list[list[str]], limit: float) -> list[dict[str, Any]]:
        """`python -m benchmarks.gpu_rows` with each of these arguments, side by side."""
        if not self.forks:
            with ThreadPoolExecutor(len(arguments)) as pool:
                command = [sys.executable, "-m", "benchmarks.gpu_rows"]
                return list(pool.map(lambda each: self.run([*command, *each], limit), arguments))
        if min(limit, self.left()) < 5:
            return [{"seconds": 0.0, "status": "no time left", "output": ""} for _ in arguments]
        jobs = [forked(lambda each=each: _gpu_rows(each), min(limit, self.left())) for each in arguments]
        while not all([job.ended() for job in jobs]):
            time.sleep(0.02)
        return [job.result() for job in jobs]


def _gpu_rows(arguments: list[str]) -> None:
    from benchmarks import gpu_rows

    gpu_rows.main(arguments)


def forked(function: Callable[[], object], limit: float) -> Job:
    """The function in a copy of this process."""
    said = tempfile.TemporaryFile("w+", errors="replace")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Job(pid, said, limit)
    status = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
        function()
        status = 0
    except SystemExit as end:
        print(end, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def gpu_name(check: Check) -> str:
    """Of the card; also finds out whether forked processes can use it."""
    say = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    for name in LOADED:
        importlib.import_module(name)
    found = forked(lambda: exec(say), 60).result()
    check.forks = found["status"] == 0 and found["output"].strip() != ""
    if not check.forks and not check.rehearsal:
        found = check.run([sys.executable, "-c", say], 60)
    return found["output"].strip().splitlines()[-1] if found["output"].strip() else ""


def build(check: Check) -> None:
    """Libraries of these sources, or new ones."""
    say = (
        "import robustft, json; from robustft import machine;"
        "print(json.dumps(robustft.build_info() | {'out of date': machine.out_of_date()}, default=str))"
    )

    def info() -> dict[str, Any]:
        run = check.run([sys.executable, "-c", say], 60)
        try:
            return json.loads(run["output"].splitlines()[-1])
        except (ValueError, IndexError):
            return {"error": run["output"][-1500:]}

    found = info()
    if check.rehearsal:
        # As far as setup.py comes without a compiler, into a folder that goes: what setuptools' age would stop.
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
            run = check.run(command, 60, ROBUSTFT_NO_NATIVE="1")
        check.keep("build", run | {"info": found})
        return
    loaded = found.get("libraries", {}).get("cuda") == "loaded"
    if loaded and not found["out of date"]:
        check.keep("build", {"status": 0, "built before": True, "info": found})
        return
    run = check.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 240)
    run["output"] = run["output"][-1500:] if run["status"] else ""
    check.keep("build", run | {"info": info()})


def values(check: Check) -> None:
    """Each public function, results and gradients, in each dtype."""
    names = check.rows([["functions"]], 30)[0]["output"].split()
    runs = dict(zip(names, check.rows([["values", name] for name in names], 75), strict=True))
    found: dict[str, Any] = {}
    for name, run in runs.items():
        lines = [json.loads(line) for line in run["output"].splitlines() if line.startswith('{"function"')]
        found[name] = {line["dtype"].removeprefix("torch."): line["error"] for line in lines}
        if run["status"] == NO_DEVICE:
            found[name]["status"] = NO_DEVICE
        elif run["status"] != 0 or not all(line["right"] for line in lines):
            found[name] |= {"wrong": True, "status": run["status"], "output": run["output"][-1500:]}
    check.keep("values", found)


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
    "sigmoid": ("test_sigmoid", "cuda"),
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
        command = [sys.executable, "-m", "pytest", "-vv", "-m", "", "--maxfail=10", "-p", "no:cacheprovider"]
        limit = deadline - time.monotonic()
        run = outcome(check.run([*command, "-k", part.selects, *part.suites], limit, OMP_NUM_THREADS="1"))
        # Tests of a GPU are not there without one (5 is pytest's status for none), or skip themselves.
        if check.rehearsal and (run["status"] == 5 or set(run["counts"]) == {"skipped"}):
            run["status"] = NO_DEVICE
        return run

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(one, part): part.name for part in parts()}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            failed = [name for name, run in done.items() if run["status"] != 0]
            status = failed or (0 if len(done) == len(futures) else "unfinished")
            last = done[futures[future]]
            news = {futures[future]: last["summary"] or last["status"]}
            check.keep("tests", {"status": status, "parts": done}, news)


def sanitizer(check: Check) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        check.keep("sanitizer", "not measured: no compute-sanitizer")
        return

    def one(kind: str) -> dict[str, Any]:
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_rows", "small"]
        run = check.run(command, 120)
        run["output"] = run["output"][-1500:] if run["status"] else run["output"][-200:]
        return run

    check.rows([["small"]], 75)  # compiles without the sanitizer's slowness
    kinds = ("memcheck", "racecheck")
    with ThreadPoolExecutor(len(kinds)) as pool:
        found = dict(zip(kinds, pool.map(one, kinds), strict=True))
    check.keep("sanitizer", found)


def rates(check: Check) -> None:
    run = check.rows([["rates"]], 60)[0]
    try:
        check.keep("rates", json.loads(run["output"].splitlines()[-1]))
    except (ValueError, IndexError):
        check.keep("rates", run)


def rows(check: Check) -> None:
    """Each row by itself, the bar's first, when all have compiled what they need side by side."""
    from benchmarks import gpu_rows

    light = [name for name in gpu_rows.ROWS if name not in HEAVY]
    first = dict(zip(light, check.rows([["once", name] for name in light], 90), strict=True))
    first[HEAVY[0]] = check.rows([["once", HEAVY[0]]], 60)[0]
    failed = {name: run["output"][-1500:] for name, run in first.items() if run["status"] != 0}
    check.keep("compiled", {"seconds": {n: run["seconds"] for n, run in first.items()}, "failed": failed})
    card = check.results.get("rates", {})
    measured: dict[str, Any] = {}
    for name in gpu_rows.ROWS:
        run = check.rows([[name]], 45)[0]
        measured[name] = gpu_rows.record(name, run["output"], card if "bf16_tflops" in card else {})
        measured[name]["seconds"] = run["seconds"]
        if run["status"] != 0:
            measured[name] |= {"status": run["status"], "output": run["output"][-1500:]}
        check.keep("rows", measured, {name: measured[name]})


def profile(check: Check) -> None:
    """What ncu says of the kernels of a row."""
    tool = shutil.which("ncu")
    if tool is None:
        check.keep("profile", "not measured: no ncu")
        return
    sections = [f"--section={name}" for name in ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats")]
    command = [tool, "--clock-control", "none", "--kernel-name", "regex:_kernel", "--launch-count", "12", *sections]
    row = next((gap.row for gap in gaps(check.results)), PROFILED)
    run = check.run([*command, sys.executable, "-m", "benchmarks.gpu_rows", "ours", row], 90)
    said = re.compile(
        r"^  \S|Duration|Throughput|Registers Per|Occupancy|Stall|No Eligible|Executed Ipc|Grid Size|Block Size"
    )
    lines = [line.rstrip()[:150] for line in run["output"].splitlines() if said.search(line)]
    check.keep(
        "profile",
        {"row": row, "status": run["status"], "seconds": run["seconds"], "said": lines[:300] or run["output"][-800:]},
    )


def host(check: Check) -> None:
    """The CPU's bar, where this host is what it was set for."""
    if check.rehearsal:
        check.keep("host", "not measured: a rehearsal")
        return
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


def tune(check: Check) -> None:
    """What ROBUSTFT_AUTOTUNE=1 finds for the table of tiles, a line for a row of it as soon as that is tuned: a process
    that is cut off leaves those that it came to."""
    found: dict[str, Any] = {}
    for name in TUNED:
        run = check.run([sys.executable, "-m", "benchmarks.gpu_rows", "ours", name], 90, ROBUSTFT_AUTOTUNE="1")
        output = run.pop("output")
        run["found"] = re.findall(r"^\w+\[.+\] = .+$", output, re.MULTILINE)
        if run["status"] != 0 and not run["found"]:
            run["output"] = output[-800:]
        found[name] = run
        check.keep("tune", found, {name: run})


class Gap(NamedTuple):
    """A row's milliseconds beside those that gpu_model.py predicts."""

    row: str
    measured: float
    predicted: float

    @property
    def times(self) -> float:
        return self.measured / self.predicted


def predictions(card: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by row, of the card's architecture (sm_90 where none is known)."""
    rows = json.loads((RESULTS / "gpu_model.json").read_text())["rows"]
    return {name: of["milliseconds"] for name, of in rows.get(card.get("architecture", "sm_90"), {}).items()}


def gaps(results: dict[str, Any]) -> list[Gap]:
    """Of the rows that were measured, the three that take the most times of what is predicted."""
    predicted = predictions(results.get("rates", {}))
    found = [
        Gap(name, row["milliseconds"]["robustft"], predicted[name])
        for name, row in results.get("rows", {}).items()
        if "milliseconds" in row and name in predicted
    ]
    return sorted(found, key=lambda gap: gap.times, reverse=True)[:3]


def closing(results: dict[str, Any]) -> str:
    """Where the kernels are farthest behind the model, and what ncu said of the farthest."""
    lines = ["", "Farthest behind what gpu_model.py predicts:"]
    lines += [
        f"  {gap.row}: {gap.measured:.3f} ms, predicted {gap.predicted:.3f}, {gap.times:.2f} times that"
        for gap in gaps(results)
    ] or ["  no row was measured"]
    said = results.get("profile", "not measured: the step was not run")
    if isinstance(said, str):
        return "\n".join([*lines, f"ncu: {said}"])
    told = said["said"] if isinstance(said["said"], list) else said["said"].splitlines()
    return "\n".join([*lines, f"ncu of {said['row']}, which ended with {said['status']}:", *told])


def demands(name: str) -> str:
    """What a row must reach."""
    from benchmarks.gpu_rows import ROWS

    bar = ROWS[name].bar
    said = [OTHER_DEMANDS[name]] if name in OTHER_DEMANDS else []
    said += [f"{bar.milliseconds:g} ms"] if bar.milliseconds is not None else []
    said += [f"{bar.eager:g}x eager"] if bar.eager is not None else []
    said += [f"{bar.peers:g}x every peer"] if bar.peers is not None else []
    return ", ".join(said)


def table(results: dict[str, Any]) -> str:
    """Every row as Markdown, those too that were not measured."""
    from benchmarks.gpu_rows import ROWS

    lines = [
        "| row | must | predicted | here | peers (their time over it) | share of roofline |",
        "|---|---|---:|---:|---|---:|",
    ]
    predicted = predictions(results.get("rates", {}))
    for name in ROWS:
        row = results.get("rows", {}).get(name, {})
        said = f"{predicted[name]:.3f} ms" if name in predicted else ""
        begin = f"| {name} | {demands(name)} | {said}"
        if "milliseconds" not in row:
            why = f" ({row['status']})" if "status" in row else ""
            lines.append(f"{begin} | not measured{why} | | |")
            continue
        times = dict(row["milliseconds"])
        ours = times.pop("robustft")
        peers = ", ".join(
            f"{peer} {t / ours:.2f}x" if isinstance(t, float) else f"{peer}: {t}" for peer, t in times.items()
        )
        share = f"{100 * row['share']:.0f} %" if row.get("share") else ""
        said = f"{ours:.3f} ms" + ("" if row["checked"] else ", result not checked")
        lines.append(f"{begin} | {said} | {peers} | {share} |")
    return "\n".join(lines)


def page() -> str:
    """results/gpu.md: what was measured on every card that a result is of."""
    from benchmarks.triton_resources import sources

    lines = [
        "# GPU rows",
        "",
        "`python -m benchmarks.gpu_check` measures them beside their peers and rewrites this page.",
        "What is predicted is by `python -m benchmarks.gpu_model`, of the present kernels, on that architecture.",
        "",
    ]
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("nvidia-*.json"))]
    for results in found:
        card = results["rates"]
        lines += [
            f"## {card['gpu']}",
            "",
            f"torch {card['torch']}, Triton {card['triton']}. Products of bfloat16 run at {card['bf16_tflops']} "
            f"TFLOP/s, of float32 at {card['fp32_tflops']}, copies at {card['copy_tb_per_second']} TB/s.",
            "",
        ]
        if results.get("sources") != sources():
            lines += [f"These are times of earlier kernels. {results.get('since', '')}".rstrip(), ""]
        lines += [table(results), ""]
        if tests := results.get("tests", {}).get("parts"):
            counts = Counter[str]()
            for part in tests.values():
                counts.update(part["counts"])
            cut = [name for name, part in tests.items() if part["status"] == "cut off"]
            said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
            lines += [f"Tests on it: {said}" + (f"; cut off: {', '.join(cut)}." if cut else "."), ""]
    if bodies := json.loads((RESULTS / "gpu_bodies.json").read_text()):
        lines += [
            f"## Both bodies of the contrastive losses, on an {bodies['gpu']}",
            "",
            f"`{bodies['command']}`. D = 512; milliseconds; the host's own are those that it takes to launch.",
            "",
            "| case | forward | backward | host, forward | host, backward |",
            "|---|---:|---:|---:|---:|",
        ]
        for case in bodies["cases"]:
            times = [f"{case[of][way]:.3f}" for of in ("milliseconds", "host") for way in ("forward", "backward")]
            lines.append(f"| {case['case']} | {' | '.join(times)} |")
    return "\n".join(lines if found else [*lines, table({})])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="stop after this many")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="these steps alone")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="print the rows instead")
    parser.add_argument("--rehearse", action="store_true", help="every step without a GPU; the output is a new folder")
    options = parser.parse_args()
    if options.list:
        print(page())
        return 0
    from benchmarks import triton_resources

    check = Check(None, options.minutes)
    check.rehearsal = options.rehearse
    card = gpu_name(check)
    if options.rehearse and card:
        print(f"there is a {card}: leave out --rehearse to measure it")
        return 1
    if not card and not options.rehearse:
        print("no GPU that torch can use: nothing is measured")
        return 2
    folder = options.output or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if options.rehearse else RESULTS)
    check.forks |= options.rehearse  # there is no GPU that a fork could not use
    check.results["command"] += " --rehearse" * options.rehearse
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "rehearsal"
    check.path = folder / f"{name}.json"
    check.results["sources"] = triton_resources.sources()
    for step in (step for step in STEPS if step in options.only):
        globals()[step](check)
    print(table(check.results))
    print(closing(check.results))
    if check.rehearsal:
        print(f"no GPU that torch can use: what each step says is in {check.path}")
        return 2
    check.results["gaps"] = [gap._asdict() for gap in gaps(check.results)]
    write_json(check.path, check.results)
    if folder == RESULTS:
        write_text(RESULTS / "gpu.md", page() + "\n")
    return 0 if "tests" not in options.only or check.results["tests"]["status"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
