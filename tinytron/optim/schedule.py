"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# The share of the decay from max_lr to min_lr that remains when the fraction ``done`` of its steps, 0 to 1, is over.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "sqrt": lambda done: 1 - math.sqrt(done),
}


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: ``schedule(t)`` is the rate of optimizer step t, counted from 0 (not in micro-batches).

    During warm-up it is ``max_lr * (t + 1) / warmup_steps``, then the function ``name`` of ``SCHEDULES``.
    """

    name: str
    max_lr: float
    min_lr: float
    warmup_steps: int
    max_steps: int
    decay_fraction: float = 0.1
    decay_shape: str = "cosine"

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        return SCHEDULES[self.name](self, step)

    def decayed(self, step: int, start: int, shape: str) -> float:
        """The rate of a decay from ``max_lr`` at step ``start`` to exactly ``min_lr`` at the last step."""
        last = self.max_steps - 1
        if step >= last:
            return self.min_lr
        done = (step - start) / (last - start) if step > start else 0.0
        return self.min_lr + (self.max_lr - self.min_lr) * DECAY_SHAPES[shape](done)


def _cosine(schedule: Schedule, step: int) -> float:
    """A half cosine wave from the end of the warm-up to the last step."""
    return schedule.decayed(step, schedule.warmup_steps, "cosine")


def _constant(schedule: Schedule, step: int) -> float:
    return schedule.max_lr


def _wsd(schedule: Schedule, step: int) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395, section 4): ``max_lr``, then a decay of shape ``decay_shape`` over the last
    ``decay_fraction`` of the steps."""
    decay_steps = max(1, round(schedule.decay_fraction * schedule.max_steps))
    start = max(schedule.warmup_steps, schedule.max_steps - decay_steps)
    return schedule.decayed(step, start, schedule.decay_shape)


# The schedules by name, for the steps after the warm-up. To add one, add a function and an entry here.
SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {"cosine": _cosine, "constant": _constant, "wsd": _wsd}
