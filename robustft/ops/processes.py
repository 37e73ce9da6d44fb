"""Several processes of torch.distributed that do one thing together: what each does, and what they tell each other.

    torchrun --nproc-per-node 4 ...     every process runs the same program, in the same order
    process 0, the main one             alone writes and shows something
    the others                          do their part of the batches, and know all that comes of it

`joined` is how a program becomes one of them. An error of one is raised by all; a process that ends is noticed at once
by gloo, and one that hangs after the group's time-out.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from robustft.machine import PROCESS_TIMEOUT

R = TypeVar("R")
Row = TypeVar("Row", bound=tuple[Any, ...])

Outcome = tuple[str, object]
"""What a function made on another process, or the error with which it failed there: see `outcome`."""
BUCKET = 25 * 2**20  # elements that are added up at a time: a copy of so many is made


@dataclass(frozen=True)
class Processes:
    """The processes of a group, as one of them sees them; without a group there is one."""

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def of_main(self, function: Callable[[], R]) -> R:
        """What the main process alone computes, on every process; its error is raised by all."""
        if self.group is None:
            return function()
        with together(ALONE):  # the others wait, and take no turns
            told = [outcome(function) if self.main else None]
        with naming(self):
            dist.broadcast_object_list(told, group=self.group, src=dist.get_global_rank(self.group, 0))
        return taken(told)[0]

    def in_turns(self, mine: Iterable[R]) -> Iterator[R]:
        """What the processes make, each in its turn, on every process: the first of each, then the second of each, and
        so on while there are any."""
        if self.group is None:
            yield from mine
            return
        items = iter(mine)
        while True:
            told: list[Outcome | None] = [None] * self.count
            with naming(self):
                dist.all_gather_object(told, outcome(lambda: list(_first(items))), group=self.group)
            found: list[list[R]] = taken(told)
            for made in found:
                yield from made
            if not any(found):
                return

    def all(self, value: R) -> list[R]:
        """The values of all processes."""
        if self.group is None:
            return [value]
        found: list[R] = [value] * self.count
        with naming(self):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def merged(self, found: Iterable[Row]) -> list[Row]:
        """What all have found, in order."""
        return sorted(one for mine in self.all(list(found)) for one in mine) if self.group else list(found)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether one of them says so."""
        if self.group is None:
            return flag
        total = torch.tensor(int(flag), device=device)
        with naming(self):
            dist.all_reduce(total, group=self.group)
        return bool(total)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives the tensors the values that they have in the main process."""
        if self.group is None:
            return
        with naming(self), torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, group=self.group, src=dist.get_global_rank(self.group, 0))
                tensor.detach().copy_(whole)

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Makes each parameter's gradient the mean of the processes'; none counts as 0 where another has one."""
        if self.group is None:
            return
        there = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device, dtype=torch.int32)
        with naming(self), torch.no_grad():
            dist.all_reduce(there, group=self.group)
            chosen = [p for p, count in zip(parameters, there.tolist(), strict=True) if count]
            for p in chosen:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for bucket in _buckets([p.grad for p in chosen if p.grad is not None]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat, group=self.group)
                flat /= self.count
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))


ALONE = Processes()
_current: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def current() -> Processes:
    """Those that read and encode data sets together, each its share."""
    return _current.get()


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Inside, these encode and measure data sets together."""
    token = _current.set(processes)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def joined(timeout: float = PROCESS_TIMEOUT) -> Iterator[Processes]:
    """All processes that run: those of torch.distributed, which this one joins if torchrun has started it.

    A group that is there already is taken as it is; one that is made here ends here, and is given up after `timeout`
    seconds without an answer. It has gloo for the CPU, and NCCL where there is a GPU, which is that of the local rank.
    ValueError for a time that is none.
    """
    if not 0 < timeout < float("inf"):
        raise ValueError(f"process_timeout must be positive and finite, got {timeout}")
    launched = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not (dist.is_available() and dist.is_initialized()):
        if not launched:
            yield ALONE
            return
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        yield Processes(dist.group.WORLD)
        dist.destroy_process_group()  # not after an error: it would wait for those that are gone
        return
    yield Processes(dist.group.WORLD) if dist.get_world_size() > 1 else ALONE


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def outcome(function: Callable[[], object]) -> Outcome:
    """("made", what a function returns), or ("failed", its error as one that can be sent to another process)."""
    try:
        return "made", function()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error whose constructor wants more than its message
            return "failed", RuntimeError(f"{type(error).__name__}: {error}")
        return "failed", error


def taken(told: Sequence[Outcome | None]) -> list:
    """What functions made on other processes; raises the error of the first that failed."""
    made = []
    for outcome in told:
        assert outcome is not None
        if outcome[0] == "failed":
            assert isinstance(outcome[1], Exception)
            raise outcome[1]
        made.append(outcome[1])
    return made


def _first(items: Iterator[R]) -> Iterator[R]:
    for item in items:
        yield item
        return


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, about `BUCKET` elements at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and not (alike and sum(t.numel() for t in bucket) + tensor.numel() <= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def naming(processes: Processes) -> Iterator[None]:
    """Says of an error inside that another process has not answered."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {processes.rank} of {processes.count} got no answer from another one, which has ended or hangs: "
            f"{error}"
        ) from error
