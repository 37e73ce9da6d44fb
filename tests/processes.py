"""What a test's functions return on each of several processes of torch.distributed, by gloo."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

CODE = "import sys; sys.path[:0] = {path!r}; import processes; processes.run(*sys.argv[1:])"


@pytest.fixture
def by_process(python, tmp_path):
    """`by_process(count, function, *words)`: what a function of the test's file returns on each, in the order of ranks;
    it is called as function(rank, *words) within a process group."""
    calls = iter(range(100))

    def results(count: int, function: Callable, *words: object) -> list:
        folder = tmp_path / f"processes-{next(calls)}"
        folder.mkdir()
        code = CODE.format(path=sys.path)
        words = tuple(map(str, (folder, count, function.__module__, function.__name__, *words)))
        started = [python.start("-c", code, str(rank), *words, folder=tmp_path) for rank in range(count)]
        for done in [one.wait() for one in started]:
            assert done.returncode == 0, done.stderr
        return [torch.load(folder / str(rank), weights_only=True) for rank in range(count)]

    return results


def run(rank: str, folder: str, count: str, module: str, function: str, *words: str) -> None:
    """One of them: they meet at a file."""
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group(
        "gloo", init_method=meeting, rank=int(rank), world_size=int(count), timeout=timedelta(seconds=60)
    )
    found = getattr(importlib.import_module(module), function)(int(rank), *words)
    torch.save(found, Path(folder) / rank)
    dist.destroy_process_group()
