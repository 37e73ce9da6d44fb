"""Encoding a batch part by part, and on several processes, for a loss of the whole batch (GradCache, arXiv 2101.06983).

    u = [f(x_1); f(x_2); ...]      features (N, D) of all parts: encoded without a graph, so that inputs alone are kept
    L(u, t, ...)                   the loss, once; its gradient dL/du (N, D)
    f(x_i) again, with a graph     and its backward from (dL/du)_i, part after part

The memory is that of one part's activations and O(N D). Within `spread`, the encoders of `robustft.clip` do that by
themselves: what calls them sees the features of the whole batch. Over a process group each rank encodes its own rows,
and every rank then holds the rows of all, in the order of ranks. A loss may be another one on each rank; what is
differentiated is their mean, and the gradient of a rank's parameters is its own share of it: their mean over the ranks,
which DistributedDataParallel takes, is that of the whole batch.

Each rank computes the whole loss, although the losses have a form in which it computes its share (`group=`,
`robustft.ops.sharded`). For CLIP's loss of 32,768 pairs of a ViT-B/16 on 8 GPUs that would save a rank 2.9 of 675 TFLOP
and 0.2 of 1.4 GB on the wire: 0.5 % of the step, at 4,096 pairs 0.1 %, twice as much with a teacher (`python -m
benchmarks.scale --paper`). It would ask for as many rows on every rank, and for a second form of each term that reads
features. On 64 GPUs it would save 4 %: there it begins to be worth this.

Dropout in a part is a function of the generator's state at the encoder's call and of the part's first row, so that it
is the same when the part is encoded again, and the same with k parts on one process as on k processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustft.data.seeds import stateless_seed
from robustft.ops.processes import Processes, naming

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class Spread(NamedTuple):
    """In how many parts a process encodes its rows, and over which processes the rows of a batch are spread."""

    parts: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def processes(self) -> Processes:
        return Processes(self.group)


_current: ContextVar[Spread | None] = ContextVar("spread", default=None)


@contextmanager
def spread(how: Spread | None) -> Iterator[None]:
    """Encoders called inside encode like this; None: as they are called."""
    token = _current.set(how)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Spread | None:
    """How the encoders spread what they are called with; None where they do not."""
    return None if torch.compiler.is_compiling() else _current.get()


def of_images(encode: Encode, images: Tensor) -> tuple[Tensor, ...]:
    """What `encode` gives for the images (n, ...) of this process, joined with that for the others' (N, ...)."""
    how = current()
    if how is None:
        return encode(images)
    first = sum(_sizes(images, how)[: how.processes.rank])
    return tuple(joined(part) for part in _by_parts(encode, images, first, how.parts))


def of_texts(encode: Encode, tokens: Tensor) -> tuple[Tensor, ...]:
    """What `encode` gives for tokens (M, L) that all processes have, each of which encodes some of the rows."""
    how = current()
    if how is None:
        return encode(tokens)
    share = -(-len(tokens) // how.processes.count)
    if share * (how.processes.count - 1) >= len(tokens):  # too few for each to have one: each encodes them all
        return _by_parts(encode, tokens, 0, how.parts)
    first = how.processes.rank * share
    return tuple(joined(part) for part in _by_parts(encode, tokens[first : first + share], first, how.parts))


def joined(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of ranks, of this one's (n, ...); each may have another number of them.

    The gradient of a rank's rows is the sum of what all ranks have for them.
    """
    how = current()
    return rows if how is None or how.group is None else _Joined.apply(rows, _sizes(rows, how), how)


def drawn_seed() -> int:
    """A number from torch's CPU generator, which moves by the same on every process."""
    return int(torch.randint(2**62, ()))


@contextmanager
def seeded(seed: int, row: int) -> Iterator[None]:
    """What is random inside is a function of (seed, row), and outside as if nothing had been drawn."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(stateless_seed(seed, row))
        yield


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], how: Spread) -> Tensor:
        ctx.sizes, ctx.how = sizes, how
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        with naming(how.processes):
            dist.all_gather(parts, padded, group=how.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.how.group)
        return total.split(ctx.sizes)[ctx.how.processes.rank], None, None


def _sizes(rows: Tensor, how: Spread) -> list[int]:
    """The number of rows that each process has."""
    if how.group is None:
        return [len(rows)]
    mine = torch.tensor(len(rows), device=rows.device)
    sizes = [torch.empty_like(mine) for _ in range(how.processes.count)]
    with naming(how.processes):
        dist.all_gather(sizes, mine, group=how.group)
    return [int(size) for size in sizes]


def _by_parts(encode: Encode, rows: Tensor, first: int, parts: int) -> tuple[Tensor, ...]:
    """`encode` of the rows, of which the first is row `first` of the batch; with several parts, encoded again in the
    backward."""
    seed = drawn_seed()

    def encoded(part: Tensor, row: int) -> tuple[Tensor, ...]:
        with seeded(seed, row), spread(None):
            return encode(part)

    if parts == 1:
        return encoded(rows, first)
    made, row = [], first
    for part in rows.split(-(-len(rows) // parts)):
        if torch.is_grad_enabled():
            made.append(checkpoint(encoded, part, row, use_reentrant=False, preserve_rng_state=False))
        else:
            made.append(encoded(part, row))
        row += len(part)
    return tuple(torch.cat(column) for column in zip(*made, strict=True))
