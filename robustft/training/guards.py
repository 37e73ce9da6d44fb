"""What holds while a run is under way: Ctrl-C waits for the step, the caller's generators stay as they were."""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from robustft.methods.base import Method


@contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Ctrl-C fills the list, for the loop to see after its step; a second Ctrl-C interrupts at once."""
    seen: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield seen  # only the main thread may set handlers; an ignored Ctrl-C stays ignored
        return

    def handler(number: int, frame: object) -> None:
        seen.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def restored(method: Method) -> Iterator[None]:
    """Whatever happens inside, the method leaves with the state it came with, and without gradients."""
    before = copy.deepcopy(method.state_dict())
    try:
        yield
    finally:
        method.load_state_dict(before)
        method.zero_grad()


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Seed at will inside; the caller's global generators go on afterwards as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
