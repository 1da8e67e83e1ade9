"""Number of sequences in each global batch of a run."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The global batch of each optimizer step, in sequences: ``full``, after ``stages`` of other sizes. A stage is a size
    and the number of steps after which it ends, counted from the first step of the run, in increasing order.

    The sizes are a function of the step alone, so they place every sequence of the run.
    """

    full: int
    stages: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> int:
        """Sequences of step ``step``, counted from 0."""
        return next((size for size, end in self.stages if step < end), self.full)

    def before(self, step: int) -> int:
        """Sequences of the first ``step`` steps."""
        total = start = 0
        for size, end in self.stages:
            total += size * max(0, min(step, end) - start)
            start = end
        return total + self.full * max(0, step - start)

    def runs(self, first: int, stop: float) -> Iterator[tuple[int, float]]:
        """The steps from ``first`` to ``stop`` as ranges of one size each: the first step of each, and the one after it."""
        for _, end in self.stages:
            if first < min(end, stop):
                yield first, min(end, stop)
                first = end
        if first < stop:
            yield first, stop

    def steps_within(self, sequences: int) -> int:
        """The largest number of steps that have at most ``sequences`` together."""
        ends = [end for _, end in self.stages]
        start = bisect.bisect_right([self.before(end) for end in ends], sequences)
        begin = ends[start - 1] if start else 0
        return begin + (sequences - self.before(begin)) // self.at(begin)

    def steps_for(self, sequences: int) -> int:
        """The smallest number of steps that have at least ``sequences`` together."""
        steps = self.steps_within(sequences)
        return steps if self.before(steps) == sequences else steps + 1

    def sizes(self) -> Iterable[int]:
        """All sizes, the full one first."""
        return (self.full, *(size for size, _ in self.stages))
