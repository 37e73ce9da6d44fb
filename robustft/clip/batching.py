"""Images through a tower a few at a time, on the CPU without a gradient: there every image is encoded by itself.

The activations of a few images stay in the cache of a core. Of a large tower all threads share a product. The products
of a small one are too small for that, and each thread takes images of its own. Features are the same either way.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import torch
from torch import Tensor, nn

ROWS = 64
"""Images a thread that go through a tower at a time."""
SMALL = 10_000_000
"""Parameters of a tower up to which whole images, or whole trainings, are divided among the threads, and not the
products."""
FEW = 4
"""Threads that each can run Python code of its own: more of them wait for each other."""


def is_small(tower: nn.Module) -> bool:
    """Whether a tower is on the CPU, and its products are too small for several threads."""
    parameters = list(tower.parameters())
    return all(p.device.type == "cpu" for p in parameters) and sum(p.numel() for p in parameters) <= SMALL


def by_parts(encode: Callable[[Tensor], Tensor], images: Tensor, tower: nn.Module) -> Tensor:
    """`encode(images)` (N, D), by parts where no image depends on another and the order does not matter."""
    if torch.is_grad_enabled() or images.device.type != "cpu" or torch.compiler.is_compiling():
        return encode(images)
    if len(images) <= ROWS or type(images) is not Tensor or any(map(_wants_all, tower.modules())):
        return encode(images)
    threads = torch.get_num_threads()
    if not 1 < threads <= FEW or not is_small(tower) or torch.is_autocast_enabled("cpu"):
        return torch.cat([encode(part) for part in images.split(ROWS * threads)])
    rounds = -(-len(images) // (ROWS * threads))
    inference = torch.is_inference_mode_enabled()

    def encoded(part: Tensor) -> Tensor:
        with torch.inference_mode() if inference else torch.no_grad():
            return encode(part)

    pool = _pool(threads, os.getpid())
    started = [pool.submit(copy_context().run, encoded, part) for part in images.tensor_split(rounds * threads)]
    return torch.cat([part.result() for part in started])


def _wants_all(module: nn.Module) -> bool:
    """Whether a module may look at the images together, is compiled for so many, or something follows its calls."""
    compiled = "_orig_mod" in module._modules
    return bool(module.training or compiled or module._forward_hooks or module._forward_pre_hooks)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that compute each by itself; of this process, because a fork has none of them."""
    pool = ThreadPoolExecutor(threads, "robustft", initializer=torch.set_num_threads, initargs=(1,))
    all_there = threading.Barrier(threads)
    for waiting in [pool.submit(all_there.wait) for _ in range(threads)]:
        waiting.result()
    torch.set_num_threads(threads)  # of threads to come, which begin with what was set last
    return pool
