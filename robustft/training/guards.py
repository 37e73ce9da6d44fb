"""What holds while a run is under way: Ctrl-C waits for the step, the caller's generators stay as they were, towers
recompute their activations."""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from robustft.clip.encoding import unwrap
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


@contextmanager
def recomputing(method: Method) -> Iterator[None]:
    """The model's towers keep the inputs of their blocks alone, and compute the rest once more in the backward.

    ValueError, naming the model, where the method or the image tower cannot; afterwards the towers are as before.
    """
    model = unwrap(method.model)
    name = f"the {type(getattr(model, 'visual', model)).__name__} image tower of the {type(model).__name__}"
    if not method.recomputes:
        raise ValueError(
            f"grad_checkpointing must be False for {type(method).__name__}, whose prompts are not there any more when "
            f"the blocks of {name} run again"
        )
    before = [(module, flag, getattr(module, flag)) for module in model.modules() for flag in _flags(module)]
    try:
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)
        # open_clip leaves towers that cannot as they were, without a word.
        if not any(getattr(module, flag) for module in model.visual.modules() for flag in _flags(module)):
            raise ValueError(f"grad_checkpointing must be False: {name} cannot recompute its activations")
        yield
    finally:
        for module, flag, value in before:
            setattr(module, flag, value)


def _flags(module: nn.Module) -> list[str]:
    return [flag for flag in ("grad_checkpointing", "gradient_checkpointing") if flag in vars(module)]
