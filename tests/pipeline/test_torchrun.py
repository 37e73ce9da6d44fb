"""`torchrun -m robustft train` on a folder: the same run on any number of processes, and after one has failed."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file
from targets import case
from test_own_images import belongings

pytestmark = [pytest.mark.exhaustive, pytest.mark.long]
# A method that fails as the environment says; and blank pictures, whose drawing takes most of the time of a small run.
FAILING = """
import os, signal, time
from robustft.evaluation import report
from robustft.methods import FLYP
from robustft.training import run

report.render = lambda drawing: (b"\\x89PNG", "<svg></svg>")

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


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ROBUSTFT = ("-c", "import sys, failing; from robustft.cli import main; sys.exit(main(sys.argv[1:]))")


@pytest.fixture
def processes(python):
    """A program in so many processes that are told what torchrun tells its own, without importing torch once more in
    each. Where the first has failed, the others are killed, as those that hang have to be."""

    def run(count: int, *command: object, environment: Mapping[str, str] = os.environ) -> CompletedProcess[str]:
        if count == 0:
            return python.run(*command, environment=environment)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "1"}
        numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        started = [python.start(*command, environment={**environment, **told, **number}) for number in numbers]
        if started[0].wait().returncode != 0:
            for other in started[1:]:
                other.kill()
        ended = [process.wait() for process in started]
        code = next((process.returncode for process in ended if process.returncode != 0), 0)
        out, err = ("".join(getattr(process, stream) for process in ended) for stream in ("stdout", "stderr"))
        return CompletedProcess(command, code, out, err)

    return run


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return belongings(tmp_path_factory.mktemp("own"), 40, 20, 16, 12, 10)


@pytest.fixture
def train(own, processes, tmp_path):
    """`robustft train` on the folder by so many processes."""
    (tmp_path / "failing.py").write_text(FAILING)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def started(count: int, output: Path, *options: str, fault: str = "", program: tuple[str, ...] = ROBUSTFT):
        environment = {**os.environ, "PYTHONPATH": path, "FAULT": fault, "OMP_NUM_THREADS": "1"}
        command = ["train", own / "photos", "--model", f"local-dir:{own / 'clip'}", "--output", output]
        command += ["--lr", "1e-3", "--epochs", "2", "--batch-size", "10", "--workers", "0", *options]
        return processes(count, *program, *command, environment=environment)

    return started


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000008" / "state.safetensors")


def same_weights(found: Path, expected: Path) -> None:
    """To the rounding of single precision, which AdamW enlarges where a gradient is little more than that.

    Moments differ by some 2e-5 of their tensor's largest. A weight with such a gradient goes another way by up to 1e-3
    a step, so the mean of a tensor is compared: it differs by 1e-7 to 1e-6. The gradient of a key's bias is 0 but for
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
        assert off.mean() < 5e-6, name


def numbers(found):
    """The numbers in a JSON value, in order."""
    if isinstance(found, dict):
        return [n for name in sorted(found) for n in numbers(found[name])]
    if isinstance(found, list):
        return [n for part in found for n in numbers(part)]
    return [found] if isinstance(found, (int, float)) else []


def test_a_folder_is_trained_alike_by_four_in_parts(train, tmp_path):
    """The test below has other numbers of processes, and the whole batch."""
    one, four = tmp_path / "one", tmp_path / "four"
    for count, folder, parts in ((0, one, ()), (4, four, ("--accum-freq", "2"))):
        done = train(count, folder, "--method", "CaRot", "LinearProbe", "--score", "knn", *parts)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1
    assert len({frozenset(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, four)}) == 1
    same_weights(four / "CaRot", one / "CaRot")
    measured = [numbers(json.loads((folder / "metrics.json").read_text())) for folder in (one, four)]
    assert measured[1] == pytest.approx(measured[0], abs=1e-4)


def test_a_process_that_fails_ends_the_run_and_another_number_goes_on(train, tmp_path):
    method = ("--method", "failing:Failing", "--ensemble", "none")
    assert train(0, tmp_path / "whole", *method).returncode == 0
    for fault, other in (("kill", 0), ("hang", 3), ("disk", 0)):
        with case(fault):
            # The first by torchrun itself, whose two processes import torch
            start = (0, (*TORCHRUN, "-m", "robustft")) if fault == "kill" else (2, ROBUSTFT)
            began, folder = time.monotonic(), tmp_path / fault
            failed = train(start[0], folder, *method, "--process-timeout", "5", fault=fault, program=start[1])
            assert failed.returncode != 0 and time.monotonic() - began < 60
            assert ("No space left on device" if fault == "disk" else "got no answer from") in failed.stderr
            checkpoints = sorted(path.name for path in (folder / "Failing" / "checkpoints").glob("step_*"))
            assert checkpoints == ["step_00000000", "step_00000004"]
            gone_on = train(other, folder, *method, "--resume")
            assert gone_on.returncode == 0, gone_on.stderr[-3000:]
            same_weights(folder / "Failing", tmp_path / "whole" / "Failing")


def test_the_loop_that_the_page_shows_is_the_same_on_two_processes(processes, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    loop = re.findall(r"<!-- runnable -->\n```python\n(.*?)```", page, re.DOTALL)[0]
    alone, both = processes(0, "-c", loop), processes(2, "-c", loop)
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    assert alone.stdout.startswith("3 ") and both.stdout == 2 * alone.stdout
