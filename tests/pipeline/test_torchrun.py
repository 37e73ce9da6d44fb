"""`torchrun -m robustft train` on a folder: the same run on any number of processes, and after one has failed."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import test_own_images
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.exhaustive
own = test_own_images.own  # a fixture of this file's tests, too

FAILING = """
import os, signal, time
from robustft.methods import FLYP
from robustft.training import run

class Failing(FLYP):
    def step(self, batch):
        if int(self.steps) == 5 and os.environ.get("RANK") == "1":
            if os.environ.get("FAULT") == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("FAULT") == "hang":
                time.sleep(1000)
        return super().step(batch)

if os.environ.get("FAULT") == "disk":
    write = run.save_checkpoint
    def save(folder, step, *state):
        if step == 8:
            raise OSError(28, "No space left on device")
        return write(folder, step, *state)
    run.save_checkpoint = save
"""


@pytest.fixture
def torchrun(own, python, tmp_path):
    """`robustft train` on the folder by so many processes."""
    (tmp_path / "failing.py").write_text(FAILING)

    def started(count: int, output: Path, *options: str, fault: str = ""):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "FAULT": fault, "OMP_NUM_THREADS": "1"}
        command = ["train", own / "photos", "--model", f"local-dir:{own / 'clip'}", "--output", output]
        command += ["--lr", "1e-3", "--epochs", "2", "--batch-size", "20", "--workers", "0", *options]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"] if count else ["-m"]
        return python.run(*start, "robustft", *command, environment=environment)

    return started


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000008" / "state.safetensors")


def same_weights(found: Path, expected: Path) -> None:
    """To the rounding of single precision, which AdamW enlarges where a gradient is little more than that.

    Moments differ by some 2e-5 of their tensor's largest. A weight with such a gradient goes another way by up to 1e-3
    a step, so the mean of a tensor is compared: it differs by some 1e-7. The gradient of a key's bias is 0 but for
    rounding (test_processes_fit.py), so of these, a third of in_proj_bias, there is only AdamW's own bound, 8 steps.
    """
    theirs = state(found)
    for name, value in state(expected).items():
        off = (theirs[name].double() - value.double()).abs()
        if name.startswith("optimizer"):
            assert off.max() <= 2e-4 * value.abs().max(), name
            continue
        if name.endswith("in_proj_bias"):
            query, key, values = off.chunk(3)
            assert key.max() <= 8e-3, name
            off = torch.cat((query, values))
        assert off.mean() < 1e-6, name


def numbers(found):
    """The numbers in a JSON value, in order."""
    if isinstance(found, dict):
        return [n for name in sorted(found) for n in numbers(found[name])]
    if isinstance(found, list):
        return [n for part in found for n in numbers(part)]
    return [found] if isinstance(found, (int, float)) else []


def test_a_folder_is_trained_alike_by_any_number(torchrun, tmp_path):
    methods = ("--method", "CaRot", "LinearProbe", "--score", "knn")
    for count in (0, 2, 4):
        done = torchrun(count, tmp_path / str(count), *methods, *(("--accum-freq", "2") if count == 4 else ()))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1
    files = {path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*")}
    for count in ("2", "4"):
        assert {path.relative_to(tmp_path / count) for path in (tmp_path / count).rglob("*")} == files
        same_weights(tmp_path / count / "CaRot", tmp_path / "0" / "CaRot")
        measured = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("0", count)]
        assert numbers(measured[1]) == pytest.approx(numbers(measured[0]), abs=1e-4)


@pytest.mark.parametrize("fault", ["kill", "hang", "disk"])
def test_a_process_that_fails_ends_the_run_and_another_number_goes_on(fault, torchrun, tmp_path):
    method = ("--method", "failing:Failing")
    assert torchrun(0, tmp_path / "whole", *method).returncode == 0
    began = time.monotonic()
    failed = torchrun(2, tmp_path / "run", *method, "--process-timeout", "5", fault=fault)
    assert failed.returncode != 0 and time.monotonic() - began < 60
    assert ("No space left on device" if fault == "disk" else "got no answer from") in failed.stderr
    assert [path.name for path in sorted((tmp_path / "run" / "Failing" / "checkpoints").glob("step_*"))] == [
        "step_00000000",
        "step_00000004",
    ]
    gone_on = torchrun(0 if fault == "kill" else 3, tmp_path / "run", *method, "--resume")
    assert gone_on.returncode == 0, gone_on.stderr[-3000:]
    same_weights(tmp_path / "run" / "Failing", tmp_path / "whole" / "Failing")


def test_the_loop_that_the_page_shows_is_the_same_on_two_processes(python, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    (tmp_path / "loop.py").write_text(re.findall(r"<!-- runnable -->\n```python\n(.*?)```", page, re.DOTALL)[0])
    alone = python.run("-c", f"exec(open({str(tmp_path / 'loop.py')!r}).read())", check=True).stdout
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = python.run(*torchrun, tmp_path / "loop.py", check=True).stdout
    assert alone.startswith("3 ") and both == 2 * alone
