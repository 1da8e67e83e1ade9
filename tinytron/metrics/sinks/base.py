"""The base class of sinks, which store or show the records of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

Record = dict[str, Any]  # has ``step`` and ``stage`` (train, val or eval); train and val records also have ``loss``


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run: its folder (whose name is the run's name), its configuration by section, the step after which it
    starts, the total number of steps, and the tokens per step, or (with a batch warm-up) of the first steps."""

    folder: Path
    config: dict[str, Any]
    first_step: int
    max_steps: int
    tokens_per_step: int
    tokens_before: Callable[[int], int] | None = None

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens of the steps after ``first``, up to ``last``."""
        if self.tokens_before is None:
            return (last - first) * self.tokens_per_step
        return self.tokens_before(last) - self.tokens_before(first)


class SinkFailedError(Exception):
    """A sink cannot continue; the reporter prints the reason and removes it."""


class Sink:
    """Stores or shows a run's records. Only the master process has sinks; ``Reporter`` calls them in the order below.

    A subclass overrides the methods it needs. ``open`` and ``resume`` run before the first step; if one of them raises,
    the run ends on every rank before it starts. Errors of the other methods are printed, and the run continues. If
    ``write`` raises, it gets its records again together with the next ones, unless it raises a SinkFailedError, which
    removes the sink. ``files`` are the names of the files and folders that it keeps in the run's folder.
    """

    files: ClassVar[tuple[str, ...]] = ()

    def say(self, text: str) -> None:
        """Show a message to the user; may be called before ``open``."""

    def open(self, run: RunInfo) -> None:
        """Start of a run."""

    def resume(self, step: int) -> None:
        """Drop the records after ``step``, because the run will write them again; called after ``open``."""

    def go_back(self, step: int) -> None:
        """Drop the records after ``step``, because training continues there and will write others; default: ``resume``."""
        self.resume(step)

    def advance(self, step: int) -> None:
        """Step ``step`` is complete; called after every step, so it must be cheap."""

    def advance_within_step(self, done: int, microbatches: int) -> None:
        """``done`` of the current step's ``microbatches`` are complete (0 when the step starts); must be cheap, too."""

    def write(self, records: Sequence[Record]) -> None:
        """Store new records, in order. Either store all of them, or raise and store none."""

    def figure(self, step: int, name: str, image: bytes) -> None:
        """Show or store a figure of ``step``, a PNG image; called in a thread."""

    def fail(self, why: str) -> None:
        """Training ends with the error ``why``, which the user will see in the terminal; ``close`` follows."""

    def close(self) -> None:
        """End of training. Records of an evaluation that the user starts may still follow."""
