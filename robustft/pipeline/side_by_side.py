"""Trainings of one run side by side, each in a process of its own with one thread.

    main process    fork ─┬─ training 1 -> its folder ─┐
                          ├─ training 2 -> its folder ─┼─> reads each folder as that of a run to resume
                          └─ training 3 -> its folder ─┘

The products of a small model are too small for several threads: they wait for each other more than they compute. Whole
trainings never wait. A training that is resumed when it is over has the same weights, bit for bit, so that nothing but
lines of text has to come back from a process.

Ctrl-C lets every process finish its step and save. An error of one stops the others in the same way, and is raised. A
main process that is killed takes them with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from robustft.clip.batching import is_small
from robustft.clip.encoding import image_tower
from robustft.ops.processes import Outcome, outcome, taken

R = TypeVar("R")
Say = Callable[[str], None]
Training = Callable[[Say, Say], object]
"""Trains into a folder, telling how far it has come and, in the end, what it did."""


def pays(model: nn.Module, trainings: int) -> bool:
    """Whether so many trainings of a model are sooner done side by side: it is small and on the CPU, and they keep all
    threads but one busy that torch would use. Not where autograd does not go through a fork, as with a GPU."""
    return (
        trainings > 1
        and 1 < torch.get_num_threads() <= trainings + 1
        and sys.platform == "linux"
        and not torch.cuda.is_available()
        and is_small(image_tower(model))
        and forks_can_train()
    )


def forks_can_train() -> bool:
    """Whether a fork of this process can compute a gradient: torch refuses where this one's autograd has threads, on a
    GPU or after gradients nested deeply. A fork tries it."""
    pid = _quietly(os.fork)
    if pid == 0:
        failed = 1
        try:
            torch.set_num_threads(1)
            torch.ones((), requires_grad=True).backward()
            failed = 0
        finally:
            os._exit(failed)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def train_apart(trainings: Mapping[str, Training], progress: Say, log: Say) -> None:
    """Does the trainings, at most one more at a time than there are threads: none idles while the longest one ends.

    progress, log: receive their lines, in this process. Raises what one of them raises, RuntimeError where one was
    killed, KeyboardInterrupt, with what each has saved, on Ctrl-C; a second Ctrl-C does not wait.
    """
    _Trainings(trainings, {"progress": progress, "log": log}).all_done()


class _Trainings:
    """Those that wait, those that run, and what has come of the others."""

    def __init__(self, trainings: Mapping[str, Training], tell: Mapping[str, Say]) -> None:
        self.waiting = dict(trainings)
        self.tell = tell
        self.running: dict[Connection, tuple[str, Any]] = {}
        self.told: list[Outcome] = []
        self.interrupted: list[str] = []
        self.stopped = False

    def all_done(self) -> None:
        try:
            while self.running or (self.waiting and not self.stopped):
                try:
                    self.go_on()
                except KeyboardInterrupt:
                    self.stop()
        finally:
            for _, process in self.running.values():
                process.kill()
                process.join()
        taken(self.told)
        if self.stopped:
            raise KeyboardInterrupt("; ".join(self.interrupted))

    def go_on(self) -> None:
        """Starts what may be started, and waits for the next that is told."""
        while self.waiting and not self.stopped and len(self.running) <= torch.get_num_threads():
            self.start(next(iter(self.waiting)))
        for channel in wait(list(self.running)):
            assert isinstance(channel, Connection)
            self.hear(channel)

    def start(self, name: str) -> None:
        heard, told = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_work, args=(self.waiting[name], told), name=name)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            _quietly(process.start)
            told.close()
            self.running[heard] = name, process
            del self.waiting[name]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def hear(self, channel: Connection) -> None:
        """Takes a line or the outcome of a training; its end without one, as a kill leaves it, is an error."""
        name, process = self.running[channel]
        try:
            kind, what = channel.recv()
        except EOFError:
            kind, what = "failed", RuntimeError(f"the process that trained {name} was killed; --resume goes on")
        if kind in self.tell:
            self.tell[kind](what)
            return
        del self.running[channel]
        channel.close()
        process.join()
        if kind == "interrupted":
            self.interrupted.append(f"{name}: {what}" if what else name)
            return
        self.told.append((kind, what))
        if kind == "failed" and not self.stopped:
            self.stop()

    def stop(self) -> None:
        """Ctrl-C for all that run: the first lets them save."""
        self.stopped = True
        for _, process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)


def _quietly(fork: Callable[[], R]) -> R:
    """Forks without Python's warning of threads: torch's are idle, and a fork uses none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return fork()


def _work(training: Training, channel: Connection) -> None:
    """What the fork does."""
    os.setpgrp()  # Ctrl-C reaches the main process alone, which passes it on once, and ends the others after an error
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # also because the pool of threads is not there after a fork

    def train() -> None:
        training(lambda line: channel.send(("progress", line)), lambda line: channel.send(("log", line)))

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        told = outcome(train)
    except KeyboardInterrupt as error:
        told = "interrupted", str(error)
    channel.send(told)


def _end_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
