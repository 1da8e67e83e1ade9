"""Time spent training: evaluation and saving are left out of tokens per second and MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG_STEP_SECONDS = 5.0  # of a longer step its progress is shown, and a stop does not wait for its end


class TrainClock:
    """A stopwatch that can be paused. ``now`` is injectable, so that tests need not wait."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lap_start = now()
        self._paused = 0.0

    def lap(self) -> float:
        """Seconds since the last lap, without pauses; starts the next lap."""
        end = self._now()
        seconds = end - self._lap_start - self._paused
        self._lap_start, self._paused = end, 0.0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context does not count."""
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start
