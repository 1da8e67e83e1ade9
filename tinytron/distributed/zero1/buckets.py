"""The position of each parameter in its flat buffer, and the part that each rank owns: pure arithmetic, no processes.

    buffer   |<------------- bucket 0 ------------->|<--------- bucket 1 --------->|
    slots    | head.weight | norm | ..down_proj |pad| ..gate_up | ..qkv |   pad    |
    owners   |  rank 0  |  rank 1  |  rank 2  | r3  | rank 0 | rank 1 | ...       |

A bucket is the unit of communication. Every bucket is cut into equal, aligned, contiguous ranges, one per rank, regardless
of parameter boundaries. So the work is balanced to the element, and reduce-scatter and all-gather need no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 128  # elements: 256 bytes of bf16, which suits vectorized kernels and NCCL


@dataclass(frozen=True)
class Slot:
    """One parameter's place: elements ``[start, start + numel)`` of the buffer, inside bucket ``bucket``."""

    index: int
    bucket: int
    start: int
    numel: int

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.numel


@dataclass(frozen=True)
class Bucket:
    """Elements ``[start, end)`` of the buffer, padding included; ``end - start`` is a multiple of the shard count."""

    start: int
    end: int


@dataclass(frozen=True)
class BufferLayout:
    """The plan of one flat buffer that ``num_shards`` ranks own together."""

    slots: tuple[Slot, ...]
    buckets: tuple[Bucket, ...]
    num_shards: int

    @property
    def numel(self) -> int:
        """Length of the buffer in elements."""
        return self.buckets[-1].end if self.buckets else 0

    def owned(self, bucket: int, shard: int) -> tuple[int, int]:
        """The range ``[start, end)`` of the buffer that rank ``shard`` owns in ``bucket``."""
        part = (self.buckets[bucket].end - self.buckets[bucket].start) // self.num_shards
        start = self.buckets[bucket].start + shard * part
        return start, start + part


def plan_buffer(numels: Sequence[int], num_shards: int, bucket_numel: int, *, whole_tensors: bool) -> BufferLayout:
    """The layout of a buffer in which each rank owns ranges of elements, or with ``whole_tensors`` whole tensors."""
    plan = plan_by_tensors if whole_tensors else plan_by_elements
    return plan(numels, num_shards, bucket_numel)


def plan_by_elements(
    numels: Sequence[int], num_shards: int, bucket_numel: int, alignment: int = ALIGNMENT
) -> BufferLayout:
    """Lay parameters out in reverse order, closing a bucket once it holds at least ``bucket_numel`` elements.

    Reverse registration order is roughly the order in which the backward pass finishes gradients, so the first bucket is
    complete first and can be reduced first. ``Slot.index`` is a position in ``numels``.
    """
    unit = num_shards * alignment
    slots: list[Slot] = []
    buckets: list[Bucket] = []
    bucket_start = end = 0
    for index in reversed(range(len(numels))):
        slots.append(Slot(index, len(buckets), end, numels[index]))
        end += numels[index]
        if end - bucket_start >= bucket_numel or index == 0:
            end = bucket_start + -(-(end - bucket_start) // unit) * unit
            buckets.append(Bucket(bucket_start, end))
            bucket_start = end
    return BufferLayout(tuple(slots), tuple(buckets), num_shards)


def plan_by_tensors(
    numels: Sequence[int], num_shards: int, bucket_numel: int, alignment: int = ALIGNMENT
) -> BufferLayout:
    """The layout for optimizers that need whole matrices: every tensor is inside one rank's range of its bucket.

    A bucket closes once it holds ``bucket_numel`` elements and a tensor for every rank. Its tensors are dealt, largest
    first, to the emptiest range, and ranges are padded to the fullest one. Padding costs memory and bandwidth but does not
    change results.
    """
    slots: list[Slot] = []
    buckets: list[Bucket] = []
    pending: list[int] = []
    bucket_start = 0
    for index in reversed(range(len(numels))):
        pending.append(index)
        full = sum(numels[i] for i in pending) >= bucket_numel and len(pending) >= num_shards
        if not full and index > 0:
            continue
        ranges: list[list[int]] = [[] for _ in range(num_shards)]
        for i in sorted(pending, key=lambda i: -numels[i]):
            min(ranges, key=lambda r: sum(_aligned(numels[j], alignment) for j in r)).append(i)
        part = max(sum(_aligned(numels[j], alignment) for j in r) for r in ranges)
        for rank, members in enumerate(ranges):
            place = bucket_start + rank * part
            for i in members:
                slots.append(Slot(i, len(buckets), place, numels[i]))
                place += _aligned(numels[i], alignment)
        buckets.append(Bucket(bucket_start, bucket_start + num_shards * part))
        bucket_start = buckets[-1].end
        pending = []
    return BufferLayout(tuple(slots), tuple(buckets), num_shards)


def _aligned(numel: int, alignment: int) -> int:
    return -(-numel // alignment) * alignment
