"""Statistics that are measured only in the steps that are reported."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from tinytron.data.batch import Batch
from tinytron.model.modules.loss import LossSums


class StepStatistics(Protocol):
    """One kind of statistics. It measures between ``begin``, before a step, and ``record``, after it, and collects on the
    device. If ``begin`` is called again instead, what was measured is dropped."""

    def begin(self) -> None:
        """Start from nothing."""

    def record(self, step: int) -> dict[str, Any]:
        """The values of all ranks together, by name; empty without ``begin``. Collective; the host waits."""


class Measuring:
    """Whether a step is measured, and what has to be undone afterwards."""

    def __init__(self) -> None:
        self._undo: contextlib.ExitStack | None = None

    def start(self) -> contextlib.ExitStack:
        """Measure from now on, in place of an earlier step whose ``stop`` was not called. What enters the result is left at
        ``stop``."""
        self.stop()
        self._undo = contextlib.ExitStack()
        return self._undo

    def stop(self) -> bool:
        """End; true if a step was measured."""
        undo, self._undo = self._undo, None
        if undo is None:
            return False
        undo.close()
        return True


class SeesLosses(Protocol):
    """Statistics of the losses of micro-batches."""

    def add(self, batch: Batch, losses: LossSums) -> None:
        """A micro-batch was trained on."""


class AllStatistics:
    """All statistics of a run. Those of losses get every micro-batch (of steps that are not reported, too)."""

    def __init__(self, of_steps: Sequence[StepStatistics], of_losses: Sequence[SeesLosses]) -> None:
        self._of_steps, self._of_losses = list(of_steps), list(of_losses)

    def begin(self) -> None:
        """The next step will be reported."""
        for one in self._of_steps:
            one.begin()

    def add(self, batch: Batch, losses: LossSums) -> None:
        """A micro-batch was trained on."""
        for one in self._of_losses:
            one.add(batch, losses)

    def record(self, step: int) -> dict[str, Any]:
        """The values by name, for a report of ``step``. Collective; the host waits."""
        found: dict[str, Any] = {}
        for one in self._of_steps:
            found |= one.record(step)
        return found
