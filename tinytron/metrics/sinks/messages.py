"""A run's messages in a file, with their time: it outlives the terminal, and every start of the run adds to it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from tinytron.metrics.sinks.base import RunInfo, Sink
from tinytron.metrics.sinks.files import append, json_line, keep_lines


class MessageLog(Sink):
    """Appends ``{"time": ..., "step": ..., "text": ...}`` for every message. ``now`` returns seconds since 1970."""

    name = "messages.jsonl"
    files = (name,)

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._path: Path | None = None
        self._early: list[tuple[float, str]] = []  # said before the folder and the step are known
        self._step = 0

    def say(self, text: str) -> None:
        if self._path is None:
            self._early.append((self._now(), text))
            return
        with contextlib.suppress(OSError):  # the console has the message; a full disk must not end the run
            append(self._path, self._line(self._now(), text))

    def open(self, run: RunInfo) -> None:
        """Add what was said before, after dropping a line that a crash cut short."""
        self._path, self._step = run.folder / self.name, run.first_step
        early, self._early = "".join(self._line(*said) for said in self._early), []
        with contextlib.suppress(OSError):
            keep_lines(self._path, lambda line: bool(json.loads(line)))
            append(self._path, early)

    def _line(self, now: float, text: str) -> str:
        return json_line({"time": round(now, 3), "step": self._step, "text": text})

    def fail(self, why: str) -> None:
        self.say(f"error: {why}")

    def advance(self, step: int) -> None:
        self._step = step

    def go_back(self, step: int) -> None:
        """Keep all messages."""
        self._step = step
