"""The schedule of collectives: when to reduce each bucket's gradients, and when to gather its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch.nn as nn

from tinytron.distributed.collectives import Work
from tinytron.distributed.zero1.flat_buffer import FlatBuffer

Bucket = tuple[int, int]  # the buffer's number, and the bucket's number in it


class ReductionSchedule:
    """The order in which buckets are reduced, and the gradients that each bucket is still missing. It uses no
    communication.

    All ranks use the same order: the order in which the backward pass, which starts with the last parameter, completes the
    buckets. Buckets become due strictly in this order, because even ranks whose gradients arrive in a different order must
    agree on the sequence of exchanges.
    """

    def __init__(self, positions: Mapping[Bucket, Sequence[int]]) -> None:
        """``positions`` has, for each bucket, its parameters' places in registration order."""
        self.order = sorted(positions, key=lambda bucket: -min(positions[bucket]))
        self._counts = {bucket: len(places) for bucket, places in positions.items()}
        self.reset()

    def reset(self) -> None:
        """Start over: no gradient has arrived, and no bucket has been started."""
        self._missing = dict(self._counts)
        self._arrived: set[tuple[int, int]] = set()
        self._started = 0

    def arrive(self, bucket: Bucket, member: int) -> None:
        """Record that the gradient of a member of ``bucket`` arrived; repeated arrivals have no effect."""
        buffer, _ = bucket
        if (buffer, member) not in self._arrived:
            self._arrived.add((buffer, member))
            self._missing[bucket] -= 1

    def has(self, buffer: int, member: int) -> bool:
        """True once the gradient of a member of a buffer has arrived."""
        return (buffer, member) in self._arrived

    def due(self, *, only_complete: bool) -> Iterator[Bucket]:
        """The buckets to start now, each once: all remaining ones, or with ``only_complete`` those before the first
        incomplete one."""
        while self._started < len(self.order):
            bucket = self.order[self._started]
            if only_complete and self._missing[bucket] > 0:
                return
            self._started += 1
            yield bucket


class ParamGather:
    """All-gathers of updated parameters: all buckets are started at once, and waited for where parameters are used."""

    def __init__(self, buffers: Sequence[FlatBuffer]) -> None:
        self._buffers = buffers
        self._works: dict[Bucket, Work | None] = {}
        self._bucket_of = {
            id(buffer.params[slot.index]): (i, slot.bucket)
            for i, buffer in enumerate(buffers)
            for slot in buffer.layout.slots
        }

    def start(self, buckets: Iterable[Bucket]) -> None:
        """Start the all-gathers of ``buckets``, in this order."""
        self._works = {(i, b): self._buffers[i].start_param_gather(b) for i, b in buckets}

    def finish(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Wait for the buckets that hold ``params`` (default: all buckets)."""
        if not self._works:
            return
        buckets = list(self._works)
        if params is not None:
            buckets = [self._bucket_of[id(p)] for p in params if id(p) in self._bucket_of]
        for bucket in buckets:
            work = self._works.pop(bucket, None)
            if work is not None:
                work.wait()
