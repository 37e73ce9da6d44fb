"""A command that several processes run together, as torchrun starts them: the main one writes and speaks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from robustft.machine import PROCESS_TIMEOUT

P = ParamSpec("P")
R = TypeVar("R")


def by_all(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with data sets read and encoded by all processes together, each its share; one alone is as before.

    Its arguments `log` and `progress` are those of the main process, and `process_timeout`, if it has one, says how
    long an answer of another is waited for.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from robustft.ops import processes

        options: dict[str, Any] = kwargs
        with processes.joined(options.get("process_timeout", PROCESS_TIMEOUT)) as all_of_them:
            if not all_of_them.main:
                options |= {"log": quiet, "progress": False}
            with processes.together(all_of_them):
                return function(*args, **kwargs)

    return wrapper


def quiet(line: str) -> None:
    """Says nothing."""
