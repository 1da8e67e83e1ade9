"""The phases of training: marked for the profiler, and timed without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

DATA, FORWARD, BACKWARD, EXCHANGE, UPDATE = "wait for data", "forward", "backward", "exchange gradients", "optimizer"
EVALUATION, SAVE, OTHER = "evaluation", "save", "other"
PHASES = (DATA, FORWARD, BACKWARD, EXCHANGE, UPDATE, EVALUATION, SAVE, OTHER)
_MOST_MARKS = 1024  # on a device, before those that are complete are added up
T = TypeVar("T")
_END: Any = object()


class PhaseTimer:
    """Adds up the seconds of each phase while it is ``active``, in the thread that trains. Every moment counts for one
    phase: the innermost one, or ``OTHER``. On a GPU these are times of the current stream, where waiting for the host and
    for an exchange counts for the phase that waits; the host does not wait.
    """

    active: PhaseTimer | None = None

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._inside = [OTHER]
        self._marks: deque[tuple[str, torch.cuda.Event]] = deque()  # the phase that ends there
        self._unused: list[torch.cuda.Event] = []
        self._since: Any = None
        self._outer: PhaseTimer | None = None  # the timer of a training in which this one takes place

    def start(self) -> None:
        """Begin to count, in place of any other timer until ``stop``."""
        self._outer, PhaseTimer.active = PhaseTimer.active, self
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._inside = [OTHER]
        self._marks.clear()
        self._since = self._event() if self._cuda else time.perf_counter()

    def stop(self) -> None:
        """Count no more."""
        if PhaseTimer.active is self:
            PhaseTimer.active, self._outer = self._outer, None

    def enter(self, name: str) -> None:
        """The phase ``name`` begins inside the current one."""
        self._mark()
        self._inside.append(name)

    def leave(self) -> None:
        """The innermost phase ends."""
        self._mark()
        self._inside.pop()

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call, or since ``start``. On a GPU the host waits for the device."""
        self._mark()
        if self._cuda:
            self._marks[-1][1].synchronize()
            self._add_up()
        found, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return found

    def _mark(self) -> None:
        if self._cuda:
            self._marks.append((self._inside[-1], self._event()))
            if len(self._marks) > _MOST_MARKS:
                self._add_up()
            return
        now = time.perf_counter()
        self._seconds[self._inside[-1]] += now - self._since
        self._since = now

    def _event(self) -> torch.cuda.Event:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self) -> None:
        while self._marks and self._marks[0][1].query():
            name, event = self._marks.popleft()
            self._seconds[name] += self._since.elapsed_time(event) / 1000
            self._unused.append(self._since)
            self._since = event


class phase:  # noqa: N801  # used like a function
    """Context of a phase, for the profiler and for the active timer."""

    __slots__ = ("_name", "_range", "_timer")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._timer = PhaseTimer.active
        if self._timer is not None:
            self._timer.enter(self._name)
        self._range = record_function(self._name)
        self._range.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._range.__exit__(kind, error, trace)
        if self._timer is not None and self._timer is PhaseTimer.active:
            self._timer.leave()


def during(name: str, items: Iterator[T]) -> Generator[T, None, None]:
    """``items``; the wait for each of them counts for the phase ``name``."""
    try:
        while True:
            with phase(name):
                item = next(items, _END)
            if item is _END:
                return
            yield item
    finally:
        if callable(close := getattr(items, "close", None)):
            close()
