"""When each bucket's gradients are reduced, and when its parameters are gathered again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch.nn as nn

from tinytron.distributed.collectives import Work
from tinytron.distributed.zero1.flat_buffer import FlatBuffer

Bucket = tuple[int, int]  # the number of its buffer, and its own in there


class ReductionSchedule:
    """The order in which buckets are reduced, and which of them have all their gradients. Pure.

    One order for all ranks: by when backward, which begins with the last parameter, completes them. Buckets are due
    strictly in this order, because ranks whose gradients come in another one must still agree on what is exchanged.
    """

    def __init__(self, positions: Mapping[Bucket, Sequence[int]]) -> None:
        """``positions``: of each bucket's parameters, their places in the order of registration."""
        self.order = sorted(positions, key=lambda bucket: -min(positions[bucket]))
        self._counts = {bucket: len(places) for bucket, places in positions.items()}
        self.reset()

    def reset(self) -> None:
        """Begin again: no gradient is there, no bucket was started."""
        self._missing = dict(self._counts)
        self._arrived: set[tuple[int, int]] = set()
        self._started = 0

    def arrive(self, bucket: Bucket, member: int) -> None:
        """The gradient of a member of ``bucket`` is there; later ones of the same member change nothing."""
        buffer, _ = bucket
        if (buffer, member) not in self._arrived:
            self._arrived.add((buffer, member))
            self._missing[bucket] -= 1

    def has(self, buffer: int, member: int) -> bool:
        """True once the gradient of a member of a buffer has arrived."""
        return (buffer, member) in self._arrived

    def due(self, *, only_complete: bool) -> Iterator[Bucket]:
        """The buckets to start now, each once: all that are left, or those in front of the first incomplete one."""
        while self._started < len(self.order):
            bucket = self.order[self._started]
            if only_complete and self._missing[bucket] > 0:
                return
            self._started += 1
            yield bucket


class ParamGather:
    """All-gathers of updated parameters: started for all buckets at once, waited for where parameters are used."""

    def __init__(self, buffers: Sequence[FlatBuffer]) -> None:
        self._buffers = buffers
        self._works: dict[Bucket, Work | None] = {}
        self._bucket_of = {
            id(buffer.params[slot.index]): (i, slot.bucket)
            for i, buffer in enumerate(buffers)
            for slot in buffer.layout.slots
        }

    def start(self, buckets: Iterable[Bucket]) -> None:
        """Start all of ``buckets``, in this order."""
        self._works = {(i, b): self._buffers[i].start_param_gather(b) for i, b in buckets}

    def finish(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Wait for those that hold ``params`` (default: for all)."""
        if not self._works:
            return
        buckets = list(self._works)
        if params is not None:
            buckets = [self._bucket_of[id(p)] for p in params if id(p) in self._bucket_of]
        for bucket in buckets:
            work = self._works.pop(bucket, None)
            if work is not None:
                work.wait()
