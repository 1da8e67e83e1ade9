"""A stop that all ranks agree on, although a signal may reach only one of them, and each at another moment."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tinytron.distributed.collectives import Waitable


class StopAgreement:
    """Each step every rank says whether it was asked to stop, and learns in the next one whether anybody was.

    The exchange runs in the background, on the host: neither host nor device waits for it, except for a rank that is more
    than a step ahead. It has a process group of its own, so that it does not wait behind others. Collective over the
    world, like ``poll``.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: Waitable | None = None

    def poll(self, received: int, *, last: bool) -> int:
        """Once per step: tell that this rank ``received`` a signal (0: none), and return the largest number that any rank
        told in the step before. ``last``: there is no next step, so nothing is told any more."""
        agreed = 0
        if self._work is not None:
            self._work.wait()
            agreed, self._work = int(self._flag), None
        if agreed == 0 and not last:
            self._flag.fill_(received)
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed
