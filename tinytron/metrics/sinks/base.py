"""What every sink is: a place where the records of a run are kept or shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # has ``step`` and ``stage`` (train, val or eval); those of train and val have ``loss``


@dataclass(frozen=True)
class RunInfo:
    """Facts about the run whose records follow: its folder (the folder's name is the run's), its configuration by section,
    the step it starts after, and its length in steps and tokens per step."""

    folder: Path
    config: dict[str, Any]
    first_step: int
    max_steps: int
    tokens_per_step: int


class Sink:
    """Keeps or shows a run's records. Only the master process has sinks; ``Reporter`` calls them in the order below.

    A subclass overrides what it needs. ``open`` and ``resume`` run before the first step and may raise: that ends the run
    before it began, on every rank. Errors of the others are printed, and the run goes on; the records that ``write``
    refused are given to it again with the next ones.
    """

    def say(self, text: str) -> None:
        """A message to the user, also before ``open``."""

    def open(self, run: RunInfo) -> None:
        """A run begins."""

    def resume(self, step: int) -> None:
        """Drop the records after ``step``, which will be written again; called once, after ``open``."""

    def advance(self, step: int) -> None:
        """Step ``step`` is complete; called after every step, so it must be cheap."""

    def advance_within_step(self, done: int, microbatches: int) -> None:
        """``done`` of the ``microbatches`` of the current step are computed, 0 when it begins; as cheap as ``advance``."""

    def write(self, records: Sequence[Record]) -> None:
        """Take new records, in order: all of them, or raise and take none."""

    def close(self) -> None:
        """Training ended. Records of an evaluation by hand may follow."""
