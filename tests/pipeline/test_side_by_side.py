"""Trainings side by side: what they leave, what is heard of them, and how they end."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch

from robustft.pipeline import side_by_side
from robustft.pipeline.side_by_side import pays, train_apart
from robustft.training.guards import deferred_interrupt
from robustft.training.steps import NonFiniteError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def until_interrupted(path):
    """A training that saves on Ctrl-C."""

    def train(progress, log):
        with deferred_interrupt() as interrupted:
            log("running")
            deadline = time.monotonic() + 30
            while not interrupted and time.monotonic() < deadline:
                time.sleep(0.005)
        path.write_text("saved")
        raise KeyboardInterrupt("stopped after step 3")

    return train


def test_all_are_done_and_what_they_say_is_heard(tmp_path):
    said, shown = [], []

    def training(name):
        def train(progress, log):
            progress(f"{name} has begun")
            (tmp_path / name).write_text(str(os.getpid()))
            log(f"{name} is done")

        return train

    train_apart({name: training(name) for name in "abcde"}, shown.append, said.append)
    assert sorted(said) == [f"{name} is done" for name in "abcde"]
    assert sorted(shown) == [f"{name} has begun" for name in "abcde"]
    assert len({(tmp_path / name).read_text() for name in "abcde"} - {str(os.getpid())}) == 5


def test_an_error_lets_the_others_save_and_is_raised_as_it_is(tmp_path):
    def fail(progress, log):
        time.sleep(0.1)
        raise NonFiniteError("step 7 is not finite", 7, ["loss"])

    with pytest.raises(NonFiniteError, match="step 7 is not finite") as raised:
        train_apart({"a": until_interrupted(tmp_path / "a"), "b": fail}, print, print)
    assert (raised.value.step, raised.value.names) == (7, ["loss"])
    assert (tmp_path / "a").read_text() == "saved"


def test_after_ctrl_c_all_have_saved_and_none_begins(tmp_path):
    running = []

    def log(line):
        running.append(line)
        if len(running) == 3:  # one more than threads
            raise KeyboardInterrupt

    trainings = {name: until_interrupted(tmp_path / name) for name in "abcd"}
    with pytest.raises(KeyboardInterrupt, match="a: stopped after step 3; "):
        train_apart(trainings, print, log)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b", "c"]


def test_a_killed_training_is_named():
    def killed(progress, log):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="the process that trained b was killed"):
        train_apart({"b": killed}, print, print)


ORPHANS = """
import os, time, torch
from robustft.pipeline.side_by_side import train_apart

def wait(progress, log):
    log(str(os.getpid()))
    time.sleep(60)

train_apart({"a": wait}, print, lambda line: print(line, flush=True))
"""


@pytest.mark.exhaustive
def test_they_end_with_the_process_that_started_them(python):
    child = python.start("-c", ORPHANS)
    pid = int(child.line())
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_pays_for_small_models_as_many_methods_and_several_threads(clip_model, monkeypatch):
    model = clip_model
    monkeypatch.setattr(side_by_side, "forks_can_train", lambda: True)
    assert pays(model, 3) and pays(model, 2) and not pays(model, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert not pays(model, 3) and pays(model, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not pays(model, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model.visual.wide = torch.nn.Linear(4000, 4000, device="meta")
    assert not pays(model, 3)


def test_forks_do_not_train_where_autograd_has_threads(python):
    code = """
import torch
from robustft.pipeline.side_by_side import forks_can_train

class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return g, None

torch.ones(3, requires_grad=True).sum().backward()
assert forks_can_train() and forks_can_train()
Nested.apply(torch.ones(1, requires_grad=True), 99).sum().backward()
assert not forks_can_train()
"""
    run = python.run("-c", code)
    assert run.returncode == 0, run.stderr


EQUAL = """
from dataclasses import replace
from pathlib import Path
import torch
from robustft.data import glyphworld
from robustft.evaluation import report
from robustft.pipeline import job, quickstart

made = glyphworld.sets(20)
made = replace(made, train=made.train.subset(range(256)), validation=made.validation.subset(range(40)))
glyphworld.sets = lambda limit: made
report.render = lambda drawing: (b"\\x89PNG", "<svg></svg>")
quickstart.QUICK_EPOCHS = 1
torch.get_num_threads = lambda: 1
files = {}
for name in ("apart", "after"):
    job.pays = lambda model, trainings: name == "apart"
    said = []
    quickstart.quickstart(name, quick=True, limit_batches=2, progress=False, log=said.append)
    steps = sorted(line.partition(",")[0] for line in said if "steps" in line)
    assert steps == [f"{method}: 2 steps" for method in ("CaRot", "FLYP", "FT")], said
    kept = (path for path in Path(name).rglob("*") if path.suffix in (".safetensors", ".jsonl", ".csv"))
    files[name] = {str(path.relative_to(name)): path.read_bytes() for path in kept}
assert len(files["apart"]) > 9 and files["apart"] == files["after"]
"""


@pytest.mark.exhaustive
def test_a_run_is_the_same_side_by_side_in_every_bit(tmp_path, python):
    run = python.run("-c", EQUAL, folder=tmp_path)
    assert run.returncode == 0, run.stderr
