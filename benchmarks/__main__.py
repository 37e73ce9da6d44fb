"""Every reduction against its peers on this machine: `python -m benchmarks` in the source tree, or `robustft bench`.

Rows are printed as they are measured, and kept: a killed run goes on where it was. At the end there are
<machine>.json, <machine>.md and plots in the output folder, and the bar is printed, row by row.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

import robustft
from robustft.files import write_text
from robustft.machine import build_cure, out_of_date

from . import machine, options, show
from .store import Store
from .work import Work

HERE = Path(__file__).resolve().parent


def works() -> dict[Path, Work]:
    """The files and what they measure."""
    files = sorted(HERE.glob("bench_*.py"))
    return {file: import_module(f".{file.stem}", __package__).WORK for file in files}


def run(*, quick: bool, only: str, threads: Sequence[int] | None, output: str | None, fresh: bool) -> int:
    """Measures, reports, and returns 0, or 1 when a candidate gave a wrong result or failed."""
    for package in ("pytest", "pytest_benchmark"):
        if find_spec(package) is None:
            raise OSError(f'{package} is not installed: pip install "robustft[bench]"')
    import pytest

    check_compiled()
    folder = Path(output) if output else machine.output_folder()
    stem = machine.slug() + ("-quick" if quick else "")
    path = folder.resolve() / f"{stem}.json"
    chosen = {}
    for file, work in works().items():
        if names := [str(row) for row in (work.quick if quick else work.rows) if re.search(only, str(row))]:
            chosen[file] = names
    if not chosen:
        known = "\n  ".join(str(row) for work in works().values() for row in (work.quick if quick else work.rows))
        raise ValueError(f"only is {only!r}; expected a pattern that matches some of\n  {known}")
    store = Store(path, fresh=fresh)
    if store.dropped:
        print(f"{path.name}: {store.dropped} rows of another build or machine are left out and measured again")
    store.write()  # says early whether the folder can be written

    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        print(f"This machine is at work on something else (load {load:.1f}, {cores} cores): times will be noisy.")
    counts = threads or [cores]
    options = [f"--bench-output={path}", f"--bench-only={only}", *(["--bench-quick"] if quick else [])]
    failed = 0
    for count in counts:
        kept = sum(store.has(name, count) for names in chosen.values() for name in names)
        rows = sum(map(len, chosen.values()))
        print(f"{rows} rows, threads: {count}" + (f"; {kept} of them are measured already" if kept else ""), flush=True)
        failed |= int(pytest.main([*_pytest(), f"--bench-threads={count}", *options, *map(str, chosen)]))
        torch.set_num_threads(count)
    store = Store(path)
    plots = show.plot(store.records, path.parent, stem)
    text = show.markdown(store.machine, store.records, quick, plots)
    write_text(path.with_suffix(".md"), text)
    print("\n" + show.verdicts(store.machine, store.records, quick))
    print(f"\n{', '.join(p.name for p in (path, path.with_suffix('.md')))} and {len(plots)} plots are in {folder}")
    return 1 if failed else 0


def check_compiled() -> None:
    """OSError unless what would be timed under robustft's name is its compiled code, and that of these sources."""
    loaded = robustft.build_info()["libraries"]["cpu"]
    if loaded != "loaded":
        raise OSError(
            f"robustft's compiled code is {loaded}: its eager reference is no candidate. Cure: {build_cure()}"
        )
    if out_of_date():
        raise OSError(f"robustft's compiled code is of other sources than these. Cure: {build_cure()}")


def _pytest() -> list[str]:
    """Of pytest's settings none is taken from where the user happens to be, and nothing is left beside the code."""
    return [
        "-q", "-s", "--no-header", "--no-summary", "--tb=short", "-p", "no:cacheprovider",
        f"--rootdir={HERE}", f"--config-file={os.devnull}", "--benchmark-quiet", "--benchmark-storage=file:///nonexistent",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(**vars(options.parser("python -m benchmarks").parse_args())))
