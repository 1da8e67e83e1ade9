"""The plan of a flat buffer: every element in one place, every rank with an equal, aligned share (P8)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinytron.distributed.zero1.buckets import ALIGNMENT, Bucket, BufferLayout, Slot, plan_by_elements

NUMELS = st.lists(st.integers(1, 5000), max_size=30)
SHARDS = st.integers(1, 17)
BUCKETS = st.integers(1, 20000)
ALIGN = st.sampled_from([1, 2, 8, 128])


@settings(max_examples=300, deadline=None)
@given(numels=NUMELS, shards=SHARDS, bucket_numel=BUCKETS, align=ALIGN)
@example(numels=[1], shards=17, bucket_numel=1, align=128)
@example(numels=[], shards=3, bucket_numel=1, align=128)
def test_the_plan_is_a_partition(numels: list[int], shards: int, bucket_numel: int, align: int) -> None:
    layout = plan_by_elements(numels, shards, bucket_numel, align)

    # Every parameter has one slot of its size, and lies in one bucket.
    assert sorted((s.index, s.numel) for s in layout.slots) == list(enumerate(numels))
    for slot in layout.slots:
        assert layout.buckets[slot.bucket].start <= slot.start
        assert slot.end <= layout.buckets[slot.bucket].end
    # Slots follow each other in reverse order and do not overlap; between two of a bucket there is no gap.
    assert [s.index for s in layout.slots] == list(reversed(range(len(numels))))
    for before, after in itertools.pairwise(layout.slots):
        gap = after.start - before.end
        assert gap == 0 if after.bucket == before.bucket else 0 <= gap < shards * align

    # Buckets cover the buffer; each is cut into equal, aligned ranges, one per rank.
    ends = [bucket.end for bucket in layout.buckets]
    assert [bucket.start for bucket in layout.buckets] == [0, *ends][: len(ends)]
    assert layout.numel == (ends[-1] if ends else 0)
    for number, bucket in enumerate(layout.buckets):
        ranges = [layout.owned(number, shard) for shard in range(shards)]
        assert [r[0] for r in ranges] + [bucket.end] == [bucket.start] + [r[1] for r in ranges]
        assert len({end - start for start, end in ranges}) == 1
        assert all(start % align == 0 for start, _ in ranges)

    # No more padding than alignment needs: less than one unit per bucket.
    assert layout.numel - sum(numels) < shards * align * len(layout.buckets) or not numels


@settings(max_examples=200, deadline=None)
@given(numels=NUMELS, shards=SHARDS, bucket_numel=BUCKETS)
def test_a_bucket_closes_with_the_parameter_that_fills_it(numels: list[int], shards: int, bucket_numel: int) -> None:
    layout = plan_by_elements(numels, shards, bucket_numel)
    for number in range(len(layout.buckets)):
        held = [slot.numel for slot in layout.slots if slot.bucket == number]
        assert held
        assert sum(held[:-1]) < bucket_numel
        assert sum(held) >= bucket_numel or number == len(layout.buckets) - 1


@settings(max_examples=100, deadline=None)
@given(numels=NUMELS, shards=SHARDS, bucket_numel=BUCKETS)
def test_ranks_own_every_element_of_a_parameter_once(numels: list[int], shards: int, bucket_numel: int) -> None:
    layout = plan_by_elements(numels, shards, bucket_numel, alignment=4)
    for slot in layout.slots:
        owned = 0
        for shard in range(shards):
            start, end = layout.owned(slot.bucket, shard)
            owned += max(0, min(end, slot.end) - max(start, slot.start))
        assert owned == slot.numel


def test_an_example_written_out() -> None:
    """Three parameters on two ranks, units of 2 x 4: 10 and 5 elements fill the first bucket (16), 3 the second (8)."""
    layout = plan_by_elements([3, 5, 10], num_shards=2, bucket_numel=12, alignment=4)
    assert layout == BufferLayout(
        slots=(Slot(2, 0, 0, 10), Slot(1, 0, 10, 5), Slot(0, 1, 16, 3)),
        buckets=(Bucket(0, 16), Bucket(16, 24)),
        num_shards=2,
    )
    assert [layout.owned(0, r) for r in (0, 1)] == [
        (0, 8),
        (8, 16),
    ]  # the second parameter is rank 1's, the first both's
    assert [layout.owned(1, r) for r in (0, 1)] == [(16, 20), (20, 24)]


@pytest.mark.parametrize("bucket_numel", [1, 100, 10**9])
def test_shares_start_at_multiples_of_the_default_alignment(bucket_numel: int) -> None:
    layout = plan_by_elements([7, 999, 64, 1], num_shards=3, bucket_numel=bucket_numel)
    assert ALIGNMENT * 2 == 256  # bytes of bf16
    assert all(layout.owned(b, r)[0] % ALIGNMENT == 0 for b in range(len(layout.buckets)) for r in range(3))


def test_the_plan_does_not_depend_on_the_rank_or_on_anything_else() -> None:
    sizes = ([5, 6, 7], 4, 8)
    assert plan_by_elements(*sizes) == plan_by_elements(*sizes)
