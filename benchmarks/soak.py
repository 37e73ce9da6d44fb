"""The quickstart, killed at random moments and resumed, until it has ended: in the bits of a run that nobody killed.

    python -m benchmarks.soak --kills 200      # results/soak.json

A kill ends the process at once, at a random moment of the run's processor time, its start and its report included, so
that a busy machine changes nothing. Compared are metrics.json and every file of weights and checkpoints in the run's
folder. Processes are forked from one that has imported the libraries and painted the images, of which there are few,
and the report's pictures are empty: what is killed is the run, not reading and drawing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib.figure import Figure

from robustft.data import Data, glyphworld
from robustft.evaluation import pictures
from robustft.files import is_unfinished
from robustft.pipeline.quickstart import quickstart
from robustft.training.run import CONFIG_FILE

from . import machine

COMPARED = (".safetensors", ".json", ".jsonl", ".yaml", "SHA256")
IMAGES = 16
"""Of the validation set and of each test set."""


def run(folder: Path, methods: tuple[str, ...], batches: int, kill_after: float | None) -> tuple[bool, float]:
    """One process that starts or resumes the quickstart in `folder`: whether it was killed before its end, and the
    seconds of processor time that it took."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill_after is not None:
                signal.setitimer(signal.ITIMER_PROF, kill_after)  # the kernel then ends the process, as by SIGKILL
            resume = (folder / CONFIG_FILE).exists()
            silent = {"progress": False, "log": lambda line: None}
            quickstart(folder, method_names=methods, quick=True, limit_batches=batches, resume=resume, **silent)
            code = 0
        finally:
            os._exit(code)
    _, ended, used = os.wait4(child, 0)
    status = os.waitstatus_to_exitcode(ended)
    if status not in (0, -signal.SIGPROF):
        raise RuntimeError(f"the run in {folder} ended with status {status}")
    return status != 0, used.ru_utime + used.ru_stime


def few_images() -> Data:
    """The quickstart's data with few images to measure on."""
    data = glyphworld.sets(IMAGES)
    return replace(data, validation=data.validation.subset(range(IMAGES)))


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
    blank = {name: lambda *_: Figure(figsize=(1, 1)) for name in ("frontier", "reliability", "scores", "samples")}
    with (
        tempfile.TemporaryDirectory() as temporary,
        patch.object(glyphworld, "sets", return_value=few_images()),
        patch.multiple(pictures, **blank),
    ):
        whole = Path(temporary) / "whole"
        _, seconds = run(whole, methods, batches, None)
        expected = content(whole)
        print(f"uninterrupted: {len(expected)} files, {seconds:.1f} s of processor time", flush=True)
        while done < kills and time.monotonic() < end:
            folder = Path(temporary) / f"run{finished}"
            while run(folder, methods, batches, chance.uniform(0.0, seconds) if done < kills else None)[0]:
                done += 1
            found = content(folder)
            if differing := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):
                raise RuntimeError(f"run {finished}, after {done} kills in all, ended in other bits: {differing}")
            left += litter(folder)
            shutil.rmtree(folder)
            finished += 1
            print(f"{done} kills, {finished} runs ended in the uninterrupted run's bits", flush=True)
    return {"kills": done, "runs_ended": finished, "files_compared": len(expected), "left_by_kills": len(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["CaRot"])
    parser.add_argument("--limit-batches", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=7200.0, help="no new run after these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = soak(options.kills, options.seed, tuple(options.methods), options.limit_batches, options.seconds)
    command = f"python -m benchmarks.soak --kills {options.kills} --seed {options.seed} --methods "
    command += f"{' '.join(options.methods)} --limit-batches {options.limit_batches}"
    machine.write("soak", command, result)


if __name__ == "__main__":
    main()
