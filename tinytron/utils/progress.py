"""The progress of work that may take longer than a few seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

BAR_SECONDS = 2.0  # quick work shows no bar
FIRST_LINE_SECONDS = 5.0
LINE_SECONDS = 30.0  # between two lines, for a log file


class Progress:
    """Shows on stderr how much of the work ``what``, such as "hashing shards", is done: ``total`` in ``unit`` ("B", or a
    noun such as "document"; ``None``: it is not known how much there is), of which ``initial`` was done
    before. Work that ends at once shows nothing, and no work does unless ``shown``. A context manager; ``now`` returns
    the time in seconds."""

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "B",
        *,
        initial: int = 0,
        shown: bool = True,
        file: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._file = sys.stderr if file is None else file
        self._now = now
        self._initial = self.done = initial
        self._began = now()
        self._next_line = self._began + FIRST_LINE_SECONDS if shown else math.inf
        self._bar: tqdm[Any] | None = None
        if shown and self._file.isatty():
            self._bar = tqdm(
                desc=what,
                total=total,
                initial=initial,
                unit=unit,
                unit_scale=True,
                dynamic_ncols=True,
                delay=BAR_SECONDS,
                leave=False,
                file=self._file,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """The time since this object was made, in seconds."""
        return self._now() - self._began

    def update(self, count: int, note: str = "") -> None:
        """``count`` more are done; ``note`` is shown at the end of the bar or line."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._now() >= self._next_line and self.done != self._total:
            self._next_line = self._now() + LINE_SECONDS
            print(self._line(note), file=self._file, flush=True)

    def _line(self, note: str) -> str:
        parts = [f"{self._what}: {scaled(self.done, self._unit)}"]
        if self._total:
            parts[0] += f" of {scaled(self._total, self._unit)} ({self.done / self._total:.0%})"
            if made := self.done - self._initial:
                left = self.seconds * (self._total - self.done) / made
                parts.append(f"{tqdm.format_interval(left)} left")
        return ", ".join([*parts, *([note] if note else [])])


def scaled(count: int, unit: str) -> str:
    """``count`` with a metric prefix and its unit: ``1.63MB``, ``1 row``, ``2.50k rows``."""
    number = tqdm.format_sizeof(count) if count >= 1000 else str(count)
    return f"{number}B" if unit == "B" else f"{number} {unit}" + ("" if count == 1 else "s")
