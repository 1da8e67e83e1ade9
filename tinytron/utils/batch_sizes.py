"""Number of sequences in each global batch of a run, and where they lie in its data."""

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


@dataclass(frozen=True)
class Skips:
    """Sequences of the data that a run passes over because it went back after a spike (``--spike_action rollback``).

    Each part is a step, counted from 0, and the number of sequences passed over before it; the steps increase.
    """

    parts: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, parts: Iterable[Iterable[int]]) -> Skips:
        """The skips whose ``parts`` are lists of two numbers, as in a checkpoint's metadata."""
        return cls(tuple((int(at), int(count)) for at, count in parts))

    def before(self, step: int) -> int:
        """Sequences passed over before step ``step``, including those right before it."""
        return sum(count for at, count in self.parts if at <= step)

    def position(self, step: int, sizes: BatchSizes) -> int:
        """The position in the data of the first sequence of ``step``."""
        return sizes.before(step) + self.before(step)

    def ranges(self, sizes: BatchSizes) -> list[tuple[int, int]]:
        """The positions that are passed over: the first of each range, and the one after it."""
        stops = [self.position(at, sizes) for at, _ in self.parts]
        return [(stop - count, stop) for stop, (_, count) in zip(stops, self.parts, strict=True)]

    def going_back(self, to: int, position: int, sizes: BatchSizes) -> Skips:
        """The skips of a run that goes back to step ``to``, when these were its skips there, and next reads
        ``position``."""
        earlier = tuple(part for part in self.parts if part[0] < to)
        return Skips((*earlier, (to, position - Skips(earlier).position(to, sizes))))
