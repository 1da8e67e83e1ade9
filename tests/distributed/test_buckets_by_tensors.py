"""The plan by whole tensors: each inside one rank's range, ranges equal and aligned, everything covered (P8)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinytron.distributed.zero1.buckets import ALIGNMENT, Bucket, BufferLayout, Slot, plan_by_tensors

NUMELS = st.lists(st.integers(1, 5000), max_size=30)
SHARDS = st.integers(1, 17)
BUCKETS = st.integers(1, 20000)
ALIGN = st.sampled_from([1, 2, 8, 128])


@settings(max_examples=300, deadline=None)
@given(numels=NUMELS, shards=SHARDS, bucket_numel=BUCKETS, align=ALIGN)
@example(numels=[1], shards=17, bucket_numel=1, align=128)
@example(numels=[], shards=3, bucket_numel=1, align=128)
@example(numels=[5000] + [1] * 20, shards=4, bucket_numel=1, align=8)
def test_every_tensor_lies_whole_in_one_ranks_range(
    numels: list[int], shards: int, bucket_numel: int, align: int
) -> None:
    layout = plan_by_tensors(numels, shards, bucket_numel, align)

    # Every tensor stands once, with its size.
    assert sorted((s.index, s.numel) for s in layout.slots) == list(enumerate(numels))

    # Buckets cover the buffer; each is cut into equal, aligned ranges, one per rank.
    ends = [bucket.end for bucket in layout.buckets]
    assert [bucket.start for bucket in layout.buckets] == [0, *ends][: len(ends)]
    assert layout.numel == (ends[-1] if ends else 0)
    for number, bucket in enumerate(layout.buckets):
        ranges = [layout.owned(number, shard) for shard in range(shards)]
        assert [r[0] for r in ranges] + [bucket.end] == [bucket.start] + [r[1] for r in ranges]
        assert len({end - start for start, end in ranges}) == 1
        assert all(start % align == 0 for start, _ in ranges)
        assert any(slot.bucket == number for slot in layout.slots)

    # A tensor begins aligned, lies inside exactly one range of its bucket, and overlaps no other.
    for slot in layout.slots:
        assert slot.start % align == 0
        ranges = [layout.owned(slot.bucket, shard) for shard in range(shards)]
        assert sum(start <= slot.start and slot.end <= end for start, end in ranges) == 1
    by_start = sorted(layout.slots, key=lambda slot: slot.start)
    assert all(before.end <= after.start for before, after in itertools.pairwise(by_start))


@settings(max_examples=200, deadline=None)
@given(numels=NUMELS, shards=SHARDS, bucket_numel=BUCKETS)
def test_a_bucket_closes_with_the_tensor_that_fills_it(numels: list[int], shards: int, bucket_numel: int) -> None:
    """In reverse order of registration, once it holds enough elements and a tensor for every rank."""
    layout = plan_by_tensors(numels, shards, bucket_numel)
    held = [sorted((s.index for s in layout.slots if s.bucket == b), reverse=True) for b in range(len(layout.buckets))]
    assert [index for bucket in held for index in bucket] == list(reversed(range(len(numels))))
    for number, bucket in enumerate(held):
        sizes = [numels[i] for i in bucket]
        assert sum(sizes[:-1]) < bucket_numel or len(sizes) - 1 < shards
        full = sum(sizes) >= bucket_numel and len(sizes) >= shards
        assert full or number == len(held) - 1


@settings(max_examples=200, deadline=None)
@given(numels=st.lists(st.integers(1, 5000), min_size=1, max_size=30), shards=SHARDS)
def test_ranges_are_no_longer_than_greedy_dealing_promises(numels: list[int], shards: int) -> None:
    """One bucket: the fullest range is at most the mean load plus the largest tensor (Graham, 1969)."""
    layout = plan_by_tensors(numels, shards, 10**9, alignment=1)
    assert layout.numel <= sum(numels) + max(numels) * (shards - 1)  # the promise, times the ranges
    starts = {layout.owned(0, shard)[0] for shard in range(shards)}
    assert len(starts & {slot.start for slot in layout.slots}) == min(shards, len(numels))  # nobody idles without need


def test_an_example_written_out() -> None:
    """Largest first to the emptiest range: 10 to rank 0; 5, and then 3, to rank 1; ranges of 12."""
    layout = plan_by_tensors([3, 5, 10], num_shards=2, bucket_numel=18, alignment=4)
    assert layout == BufferLayout(
        slots=(Slot(2, 0, 0, 10), Slot(1, 0, 12, 5), Slot(0, 0, 20, 3)), buckets=(Bucket(0, 24),), num_shards=2
    )


@pytest.mark.parametrize("bucket_numel", [1, 100, 10**9])
def test_shares_start_at_multiples_of_the_default_alignment(bucket_numel: int) -> None:
    layout = plan_by_tensors([7, 999, 64, 1], num_shards=3, bucket_numel=bucket_numel)
    assert all(slot.start % ALIGNMENT == 0 for slot in layout.slots)
    assert all(layout.owned(b, r)[0] % ALIGNMENT == 0 for b in range(len(layout.buckets)) for r in range(3))
