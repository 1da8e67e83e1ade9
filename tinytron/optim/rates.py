"""Learning rate and weight decay of each step, and how they reach the optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tinytron.optim.schedule import DECAY_SHAPES

# The weight decay follows a line or half a cosine wave to its last value, or the learning rate.
WEIGHT_DECAY_SCHEDULES = ("constant", "linear", "cosine", "lr")


@dataclass(frozen=True)
class Rates:
    """The learning rate ``lr(step)``, with peak ``max_lr``, and the weight decay of each optimizer step, counted from 0.

    The decay goes from ``decay`` in the first step to exactly ``decay_end`` in the last of ``max_steps``, in the shape
    ``decay_schedule``, or stays in proportion to the rate (``lr``). It scales what each group was built with, so a group
    without weight decay keeps none.
    """

    lr: Callable[[int], float]
    max_lr: float = 1.0
    max_steps: int = 1
    decay: float = 0.0
    decay_end: float = 0.0
    decay_schedule: str = "constant"

    def decay_factor(self, step: int, lr: float) -> float:
        """The weight decay of a step with the rate ``lr``, as a multiple of that of the groups."""
        if self.decay_schedule == "lr":
            return lr / self.max_lr
        if self.decay_schedule == "constant":
            return 1.0
        done = min(1.0, step / max(1, self.max_steps - 1))
        share = DECAY_SHAPES[self.decay_schedule](done)
        return share + (1 - share) * self.decay_end / self.decay

    def apply(self, groups: Iterable[dict[str, Any]], step: int, lr: float) -> None:
        """Set the rate, times the group's ``lr_mult``, and the weight decay in each of an optimizer's ``groups``."""
        for group in groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            if self.decay_schedule != "constant" and "weight_decay" in group:
                whole = group.setdefault("initial_weight_decay", group["weight_decay"])
                group["weight_decay"] = whole * self.decay_factor(step, lr)
