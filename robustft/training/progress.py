"""How far a run has come, for whoever waits: a bar or lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A bar where there is a terminal, elsewhere a line every few seconds: bars fill log files."""

    def __init__(self, name: str, total: int, done: int, shown: bool, log: Callable[[str], None] | None) -> None:
        self.name, self.total, self.done = name, total, done
        self.lines = shown and (log is not None or not sys.stderr.isatty())
        self.log = log or to_stderr
        self.bar = None
        if shown and not self.lines:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True)
        self.started = self.told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, what: str) -> None:
        """Something that is no step: a line of its own."""
        if self.bar is not None:
            self.bar.write(f"{self.name}: {what}", file=sys.stderr)
        elif self.lines:
            self.log(f"{self.name}: {what}")

    def update(self, step: int, epoch: str, loss: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{epoch}, {loss}", refresh=False)
            self.bar.update()
        now = time.monotonic()
        if self.lines and (step == self.total or now - self.told >= SECONDS_BETWEEN_LINES):
            self.told = now
            rate = (step - self.done) / (now - self.started)
            self.log(f"{self.name}: {epoch}, step {step}/{self.total}, {loss}, {rate:.1f} steps/s")


class Clock:
    """Steps a second since it was asked last, without the time for which it was stopped."""

    def __init__(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()

    def rate(self, step: int) -> float:
        """Of the steps until `step`, at least one."""
        done, now = step - self.step, time.perf_counter()
        seconds = now - self.since
        self.step, self.since = step, now
        return done / seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done inside does not count."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before


def to_stderr(line: str) -> None:
    """Shows a line that is not part of what was asked for."""
    print(line, file=sys.stderr, flush=True)
