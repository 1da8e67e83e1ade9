"""Learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "constant", "wsd"]
DecayShape = Literal["linear", "cosine", "sqrt"]


@dataclass(frozen=True)
class Schedule:
    """``schedule(t)`` is the rate of optimizer step t, counted from 0; micro-batches do not count.

    Warm-up: ``max_lr * (t + 1) / warmup_steps``. Then ``cosine``: a half wave to exactly ``min_lr`` at the last step;
    ``constant``: ``max_lr``; ``wsd`` (warm-up, stable, decay; arXiv:2404.06395, section 4): ``max_lr``, and over the last
    ``decay_fraction`` of the steps down to exactly ``min_lr`` in ``decay_shape``.
    """

    name: ScheduleName
    max_lr: float
    min_lr: float
    warmup_steps: int
    max_steps: int
    decay_fraction: float = 0.1
    decay_shape: DecayShape = "cosine"

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.max_lr
        start = self.warmup_steps
        if self.name == "wsd":
            start = max(start, self.max_steps - max(1, round(self.decay_fraction * self.max_steps)))
        last = self.max_steps - 1
        if step >= last:
            return self.min_lr
        done = (step - start) / (last - start) if step > start else 0.0
        shape = self.decay_shape if self.name == "wsd" else "cosine"
        remaining = {
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "sqrt": 1 - math.sqrt(done),
        }[shape]
        return self.min_lr + (self.max_lr - self.min_lr) * remaining
