"""A run's messages in a file, with their time: it outlives the terminal, and every start of the run adds to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from tinytron.metrics.sinks.base import RunInfo, Sink
from tinytron.metrics.sinks.files import append, json_line


class MessageLog(Sink):
    """Appends ``{"time": ..., "step": ..., "text": ...}`` for every message. ``now`` returns seconds since 1970."""

    name = "messages.jsonl"

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._path: Path | None = None
        self._early: list[str] = []  # lines said before the folder is known
        self._step = 0

    def say(self, text: str) -> None:
        line = json_line({"time": round(self._now(), 3), "step": self._step, "text": text})
        if self._path is None:
            self._early.append(line)
            return
        with contextlib.suppress(OSError):  # the console has the message; a full disk must not end the run
            append(self._path, line)

    def open(self, run: RunInfo) -> None:
        self._path, self._step = run.folder / self.name, run.first_step
        early, self._early = "".join(self._early), []
        with contextlib.suppress(OSError):
            append(self._path, early)

    def advance(self, step: int) -> None:
        self._step = step
