"""Who sits where: pure rank arithmetic, so a 1,024-rank layout is tested on a laptop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinytron.errors import ConfigError

AXES = ("world", "dp", "sep", "edp", "ep", "self")


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class ParallelLayout:
    """One world, factored twice: dense tensors see ``dp x sep``, experts see ``edp x ep``; the right-hand axis of each
    product is adjacent ranks. ``ep`` 0 means ``sep``, the documented sequence-expert joint group.

    Raises: ConfigError if ``sep`` or ``ep`` does not divide ``world_size``.
    """

    world_size: int
    sep: int = 1
    ep: int = 0

    def __post_init__(self) -> None:
        if self.ep == 0:
            object.__setattr__(self, "ep", self.sep)
        for flag, size in (("sep_size", self.sep), ("ep_size", self.ep)):
            if size not in divisors(self.world_size):
                raise ConfigError(
                    f"--{flag} {size} must divide the number of processes, {self.world_size}; "
                    f"use one of {divisors(self.world_size)}"
                )

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas of a sequence-parallel group."""
        return self.world_size // self.sep

    def ranks(self, axis: str) -> list[list[int]]:
        """Every group of ``axis``: 4 ranks with sep=2 give ``ranks("sep") == [[0, 1], [2, 3]]``."""
        world = np.arange(self.world_size)
        dense, expert = world.reshape(-1, self.sep), world.reshape(-1, self.ep)
        groups = {
            "world": world[None],
            "sep": dense,
            "dp": dense.T,
            "ep": expert,
            "edp": expert.T,
            "self": world[:, None],
        }
        members: list[list[int]] = groups[axis].tolist()
        return members
