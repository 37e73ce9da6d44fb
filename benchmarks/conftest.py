"""pytest's side of the benchmarks: their options, the rows of each file, and `race`, which measures one.

pytest benchmarks/bench_contrastive.py --bench-quick      # alone; `python -m benchmarks` runs all and reports
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from . import show, timing
from .store import Store
from .work import Row, Work


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("robustft benchmarks")
    group.addoption("--bench-threads", type=int, default=torch.get_num_threads(), help="threads of all candidates")
    group.addoption("--bench-quick", action="store_true", help="fewer and smaller rows")
    group.addoption("--bench-only", default="", metavar="PATTERN", help="rows whose name matches")
    group.addoption("--bench-output", metavar="FILE", help="where each row is added; those in it are not repeated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        chosen = selected(metafunc.module.WORK, metafunc.config)
        metafunc.parametrize("row", chosen, ids=[str(row).replace(" ", "-") for row in chosen])


def selected(work: Work, config: pytest.Config) -> list[Row]:
    rows = work.quick if config.getoption("bench_quick") else work.rows
    return [row for row in rows if re.search(config.getoption("bench_only"), str(row))]


@pytest.fixture
def race(benchmark, pytestconfig):
    """`race(work, row)` measures a row that the results do not hold yet, adds it, and prints a line."""
    threads = pytestconfig.getoption("bench_threads")
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def run(work: Work, row: Row) -> None:
        output = pytestconfig.getoption("bench_output")
        store = Store(Path(output)) if output else None
        if store and store.has(str(row), threads):
            pytest.skip("measured already")
        limits = timing.QUICK if pytestconfig.getoption("bench_quick") else timing.FULL
        record = timing.measure(work, row, threads, limits, benchmark)
        if store:
            store.add(record)
        print(show.line(record), flush=True)

    return run


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots between the lines that `race` prints."""
    return (report.outcome, "", "") if report.when == "call" and not report.failed else None
