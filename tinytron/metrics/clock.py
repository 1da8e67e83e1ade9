"""The time spent on training, without evaluation and saving, for tokens per second and MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG_STEP_SECONDS = 5.0  # a longer step shows its progress, and a stop request does not wait for it to finish


class TrainClock:
    """A stopwatch that can be paused. Tests pass their own ``now``, so that they need not wait."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lap_start = now()
        self._paused = 0.0

    def lap(self) -> float:
        """Return the seconds since the last lap, without pauses, and start the next lap."""
        end = self._now()
        seconds = end - self._lap_start - self._paused
        self._lap_start = end
        self._paused = 0.0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count."""
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start
