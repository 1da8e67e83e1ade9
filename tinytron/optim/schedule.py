"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

# The share of the decay from max_lr to min_lr that remains when the fraction ``done`` of its steps, 0 to 1, is over.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "sqrt": lambda done: 1 - math.sqrt(done),
}


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: ``schedule(t)`` is the rate of optimizer step t, counted from 0 (not in micro-batches).

    During warm-up it is ``max_lr * (t + 1) / warmup_steps``, then the function ``name`` of ``SCHEDULES``. A decay begins at
    ``max_lr`` in the first step after the warm-up and has exactly ``min_lr`` in the last step. transformers differs by one
    step at both ends: its first step has the rate 0, and its decay would end in the step after the last one.

    With ``warmup_start`` the first step has that fraction of ``max_lr``, and the rate rises by equal amounts to ``max_lr``
    in the first step after the warm-up; 0 gives transformers' warm-up. ``stages`` are the fractions of the steps at which
    the later stages of ``cosine_rewarm`` begin, and ``rewarm_lr`` is their peak.
    """

    name: str
    max_lr: float
    min_lr: float
    warmup_steps: int
    max_steps: int
    decay_fraction: float = 0.1
    decay_shape: str = "cosine"
    power: float = 1.0
    cycles: int = 1
    constant_fraction: float = 0.5
    warmup_start: float | None = None
    stages: tuple[float, ...] = ()
    rewarm_lr: float = 1e-4

    def __call__(self, step: int) -> float:
        if step >= self.warmup_steps or self.stages:  # each stage has a warm-up of its own
            return SCHEDULES[self.name](self, step)
        if self.warmup_start is None:
            return self.max_lr * (step + 1) / self.warmup_steps
        return self.max_lr * (self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps)

    def decayed(self, step: int, start: int, remaining: Callable[[float], float]) -> float:
        """The rate of a decay from ``max_lr`` at step ``start`` to exactly ``min_lr`` at the last step. ``remaining`` is as
        in ``DECAY_SHAPES``."""
        last = self.max_steps - 1
        if step >= last:
            return self.min_lr
        done = (step - start) / (last - start) if step > start else 0.0
        return self.min_lr + (self.max_lr - self.min_lr) * remaining(done)


def fitting_warmup(steps: int, length: int) -> int:
    """A warm-up of ``steps``, or of a tenth of a run of ``length`` steps that it would fill."""
    return max(1, length // 10) if steps >= length and steps > 1 else steps


def _cosine(schedule: Schedule, step: int) -> float:
    """A half cosine wave from the end of the warm-up to the last step."""
    return schedule.decayed(step, schedule.warmup_steps, DECAY_SHAPES["cosine"])


def _linear(schedule: Schedule, step: int) -> float:
    """A straight line from the end of the warm-up to the last step."""
    return schedule.decayed(step, schedule.warmup_steps, DECAY_SHAPES["linear"])


def _polynomial(schedule: Schedule, step: int) -> float:
    """The part of the steps that is left, to the power of ``power``."""
    return schedule.decayed(step, schedule.warmup_steps, lambda done: (1 - done) ** schedule.power)


def _cosine_with_restarts(schedule: Schedule, step: int) -> float:
    """``cycles`` half waves of equal length, each from ``max_lr`` down to ``min_lr`` (arXiv:1608.03983, section 3)."""
    wave = DECAY_SHAPES["cosine"]
    return schedule.decayed(step, schedule.warmup_steps, lambda done: wave(schedule.cycles * done % 1.0))


def _constant(schedule: Schedule, step: int) -> float:
    return schedule.max_lr


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    """Falls with the root of the steps, however long the run is (arXiv:1706.03762, section 5.3). The time scale is the
    warm-up; without one it is 10,000 steps from the first step, as in transformers."""
    if schedule.warmup_steps:
        return schedule.max_lr * math.sqrt(schedule.warmup_steps / step)
    return schedule.max_lr * math.sqrt(_TIMESCALE / (_TIMESCALE + step))


def _wsd(schedule: Schedule, step: int) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395, section 4): ``max_lr``, then a decay of shape ``decay_shape`` over the last
    ``decay_fraction`` of the steps."""
    decay_steps = max(1, round(schedule.decay_fraction * schedule.max_steps))
    start = max(schedule.warmup_steps, schedule.max_steps - decay_steps)
    return schedule.decayed(step, start, DECAY_SHAPES[schedule.decay_shape])


def _wsds(schedule: Schedule, step: int) -> float:
    """Warm-up, stable, decay, stable: like ``wsd``, but the decay ends before the last ``constant_fraction`` of the steps,
    which stay at ``min_lr`` for continual learning."""
    decay_steps = max(1, round(schedule.decay_fraction * schedule.max_steps))
    tail = round(schedule.constant_fraction * schedule.max_steps)
    before = replace(schedule, max_steps=max(schedule.warmup_steps + 1, schedule.max_steps - tail))
    start = max(schedule.warmup_steps, before.max_steps - decay_steps)
    return before.decayed(step, start, DECAY_SHAPES[schedule.decay_shape])


def _cosine_rewarm(schedule: Schedule, step: int) -> float:
    """In each of the ``stages`` a warm-up and half a cosine wave, as in a run of its own: the first stage up to ``max_lr``,
    later ones to ``rewarm_lr``."""
    step = min(step, schedule.max_steps - 1)
    bounds = [0, *(round(part * schedule.max_steps) for part in schedule.stages), schedule.max_steps]
    stage = bisect.bisect_right(bounds, step) - 1
    length = bounds[stage + 1] - bounds[stage]
    of_stage = replace(
        schedule,
        name="cosine",
        max_lr=schedule.rewarm_lr if stage else schedule.max_lr,
        warmup_steps=fitting_warmup(schedule.warmup_steps, length),
        max_steps=length,
        stages=(),
    )
    return of_stage(step - bounds[stage])


_TIMESCALE = 10_000  # steps
# The schedules by name, for the steps after the warm-up. To add one, add a function and an entry here.
SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "polynomial": _polynomial,
    "cosine_with_restarts": _cosine_with_restarts,
    "constant": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
    "wsds": _wsds,
    "cosine_rewarm": _cosine_rewarm,
    # transformers' names of the above
    "cosine_with_min_lr": _cosine,
    "constant_with_warmup": _constant,
    "warmup_stable_decay": _wsd,
}
