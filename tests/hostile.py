"""Arguments that no function expects, and what a function may answer to them."""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from robustft.ops.registry import Call
from robustft.training.steps import NonFiniteError

SECONDS = 20  # that one call may take
ENDLESS = ("epochs",)  # of which so many may be meant
# Of data and of batches, which errors call by their own names.
PARTS = (
    "dataset",
    "images",
    "labels",
    "features",
    "projection",
    "logits",
    "batch",
    "templates",
    "class_names",
)  # of data and batches, which errors call by their own names
HUGE = 10**9  # what of each number a little memory is taken for would not fit into any machine


def of_any_kind() -> Iterator[Any]:
    """What is of the wrong kind nearly everywhere."""
    yield from (None, "word", "", [], [1, 2], [[1.0], [1.0, 2.0]], {}, {"a": 1}, object(), 1j, True, -1, 0, 10**30)
    yield from (HUGE, 2.5, -1e300, float("nan"), float("inf"), -float("inf"), np.int64(2), np.float32(0.5), np.zeros(3))
    yield from (np.array(["a"]), torch.tensor(-1.0), torch.tensor(True), torch.tensor(1j), torch.zeros(0))
    yield from (torch.zeros(2, 0), lambda: 0, b"bytes", (n for n in range(2)), {1, 2}, ["a", None], (None, None), int)
    yield torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (3, 3))
    yield torch.nn.Linear(1, 1)


def of_tensors(valid: torch.Tensor) -> Iterator[Any]:
    """A tensor in whose place another one stands: another kind, shape, place or content."""
    valid = valid.detach()
    yield from (valid.numpy(), valid.tolist(), valid[None], valid.flatten()[:0], valid.to("meta"), valid.to_sparse())
    for dtype in (torch.bool, torch.complex64, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32):
        yield valid.to(dtype)
    yield from (valid.double(), valid.half(), torch.full_like(valid, -1), torch.full_like(valid, 100))
    if valid.dim():
        yield from (valid[:-1], valid[..., :-1], torch.cat([valid, valid]))
    if valid.is_floating_point():
        yield from (torch.full_like(valid, float("nan")), torch.full_like(valid, float("inf")), valid.long())
        if valid.dim() == 2:
            yield valid.to_sparse_csr()


def hostile(valid: Any) -> Iterator[Any]:
    """Arguments of the wrong kind, and of the right kind with something wrong."""
    yield from of_any_kind()
    if isinstance(valid, torch.Tensor):
        yield from of_tensors(valid)
    elif isinstance(valid, (tuple, list)) and valid:
        yield from (list(valid), valid[:1], valid[:-1], [*valid, valid[0]], [*valid, None], (part for part in valid))
        for changed in hostile(valid[0]) if isinstance(valid[0], torch.Tensor) else ():
            yield (changed, *valid[1:])
    elif isinstance(valid, dict) and valid:
        first = next(iter(valid))
        yield from ({first: None}, {None: valid[first]}, {**valid, "another": valid[first]}, list(valid.items()))


def few(valid: Any) -> Iterator[Any]:
    """One of each kind, for every day."""
    yield from (None, "word", [1, 2], -1, HUGE, float("nan"), torch.zeros(0), torch.tensor(True), object())
    if isinstance(valid, torch.Tensor):
        yield from (valid.detach().to("meta"), valid.detach()[None], valid.detach().to_sparse())
        yield from (valid.to(torch.uint16), valid.to(torch.complex64), torch.full_like(valid, -1))


class TooLong(BaseException):
    pass


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def failures(
    function: Callable[..., Any], call: Call, name: str, *, values: Callable[[Any], Any] = hostile, skip: tuple = ()
) -> Iterator[str]:
    """What a hostile argument leads to other than a result or an error that names it."""
    bound = inspect.signature(function).bind(*call.arguments, **call.options)
    bound.apply_defaults()
    for argument, valid in bound.arguments.items():
        parameter = bound.signature.parameters[argument]
        if argument in ("group", *skip) or parameter.kind is parameter.VAR_KEYWORD:
            continue
        takes_callables = re.search("Callable|Template|Tokenizer|OnRecord|Any", str(parameter.annotation))
        for value in values(valid):
            if callable(value) and takes_callables or value is HUGE and argument in ENDLESS:
                continue  # what a callable raises itself is its own
            bound.arguments[argument] = value
            told = f"{name}({argument}={value!r:.60})"
            try:
                with at_most(SECONDS):
                    function(*bound.args, **bound.kwargs)
            except (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError) as error:
                # By its name, or, where two do not fit together, the other's; a file by its path.
                names = "|".join([*bound.arguments, *PARTS])
                given = value if isinstance(value, list) else [value]
                place = "|".join(re.escape(part) for part in given if isinstance(part, str) and part) or r"\b\B"
                if not re.search(rf"\b({names})\b|{place}", str(error)):
                    yield f"{told}: {type(error).__name__}: {str(error)[:200]}"
            except TooLong:
                yield f"{told}: does not end"
            except NonFiniteError:
                pass  # what a training may come to
            except Exception as error:
                yield f"{told}: raw {type(error).__name__}: {str(error)[:200]}"
        bound.arguments[argument] = valid
