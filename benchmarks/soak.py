"""The quickstart, killed at random moments and resumed, until it has ended: in the bits of a run that nobody killed.

    python -m benchmarks.soak --kills 200      # results/soak.json

A kill is a SIGKILL at a random time of the run, its start and its report included. Compared are metrics.json and every
file of weights and checkpoints in the run's folder. Processes are forked from one that has imported the libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import signal
import tempfile
import time
from pathlib import Path

import torch

from robustft.files import is_unfinished, write_json
from robustft.pipeline.quickstart import quickstart
from robustft.training.run import CONFIG_FILE

from .machine import RESULTS

COMPARED = (".safetensors", ".json", ".jsonl", ".yaml", "SHA256")


def run(folder: Path, methods: tuple[str, ...], batches: int, kill_after: float | None) -> bool:
    """One process that starts or resumes the quickstart in `folder`; whether it was killed before its end."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receive)
            resume = (folder / CONFIG_FILE).exists()
            silent = {"progress": False, "log": lambda line: None}
            quickstart(folder, method_names=methods, quick=True, limit_batches=batches, resume=resume, **silent)
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    # The pipe ends with the child.
    killed = not select.select([receive], [], [], kill_after)[0]
    if killed:
        os.kill(child, signal.SIGKILL)
    os.close(receive)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run in {folder} ended with status {status}")
    return status != 0


def content(folder: Path) -> dict[str, str]:
    """A digest of each file that must come out the same."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name.endswith(COMPARED)
    }


def litter(folder: Path) -> list[str]:
    """What killed processes have left beside the files of the finished run."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if is_unfinished(path))


def soak(kills: int, seed: int, methods: tuple[str, ...], batches: int, limit: float) -> dict[str, object]:
    chance = random.Random(seed)
    done = finished = 0
    left: list[str] = []
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        started = time.monotonic()
        run(whole, methods, batches, None)
        seconds = time.monotonic() - started
        expected = content(whole)
        print(f"uninterrupted: {len(expected)} files, {seconds:.1f} s", flush=True)
        while done < kills and time.monotonic() < end:
            folder = Path(temporary) / f"run{finished}"
            while run(folder, methods, batches, chance.uniform(0.0, seconds) if done < kills else None):
                done += 1
            if content(folder) != expected:
                raise RuntimeError(f"run {finished}, after {done} kills in all, ended in other bits")
            left += litter(folder)
            finished += 1
            print(f"{done} kills, {finished} runs ended in the uninterrupted run's bits", flush=True)
    return {"kills": done, "runs_ended": finished, "files_compared": len(expected), "left_by_kills": len(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["FT", "CaRot"])
    parser.add_argument("--limit-batches", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=7200.0, help="no new run after these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = soak(options.kills, options.seed, tuple(options.methods), options.limit_batches, options.seconds)
    command = f"python -m benchmarks.soak --kills {options.kills} --seed {options.seed} --methods "
    command += f"{' '.join(options.methods)} --limit-batches {options.limit_batches}"
    write_json(RESULTS / "soak.json", {"command": command, **result})


if __name__ == "__main__":
    main()
