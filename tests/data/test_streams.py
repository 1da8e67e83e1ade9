"""Iterable data sets: who gets which sample of the stream, over layouts, ends and resumption."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tinytron.data.streams import StreamLoader, ValStreamLoader
from tinytron.errors import DataError


class Stream(IterableDataset[Any]):
    """Rows of two tokens that tell the epoch and the sample's number; ``reads`` counts the samples that were given."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.reads = count, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            self.reads += 1
            yield [100 * self.epoch + number, 7]


class Skipping(Stream):
    def skip(self, count: int) -> Iterator[Any]:
        for number in range(count, self.count):
            self.reads += 1
            yield [number, 7]


def rows(dataset: Any, batches: int, *, rank: int = 0, dp: int = 1, micro_batch: int = 2, start: int = 0) -> list[Any]:
    loader = StreamLoader(dataset, global_batch=8, micro_batch=micro_batch, dp_rank=rank, dp_size=dp)
    loader.start_step = start
    return [batch.input_ids[:, 0].tolist() for batch in itertools.islice(loader, batches)]


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 8), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_ranks_together_read_the_stream_in_order(dp: int, micro_batch: int) -> None:
    each = 8 // (dp * micro_batch)
    ranks = [rows(Stream(1000), 3 * each, rank=r, dp=dp, micro_batch=micro_batch) for r in range(dp)]
    walk = [i for b in range(3 * each) for r in range(dp) for i in ranks[r][b]]
    assert walk == list(range(24))


@pytest.mark.parametrize("cls", [Stream, Skipping])
@pytest.mark.parametrize("count", [5, 8, 11, 64])
@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_it_begins_again_after_its_end_and_goes_on_where_it_was(cls: type[Stream], count: int, start: int) -> None:
    expected = [100 * (p // count) + p % count for p in range(8 * start, 8 * start + 16)]
    stream = cls(count)
    assert [i for row in rows(stream, 8, start=start) for i in row] == expected
    if cls is Skipping and 8 * start < count:
        assert stream.reads == 16  # nothing was read in vain


def test_a_stream_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="Stream gave no sample; it must give some on every pass"):
        rows(Stream(0), 1)


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(("count", "limit"), [(1, None), (7, None), (12, None), (12, 5), (7, 100)])
def test_validation_reads_each_sample_once(count: int, limit: int | None, dp: int, micro_batch: int) -> None:
    ranks = [
        list(ValStreamLoader(Stream(count), num_samples=limit, micro_batch=micro_batch, dp_rank=r, dp_size=dp))
        for r in range(dp)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    found = [
        int(row)
        for batches in ranks
        for batch in batches
        for row, label in zip(batch.input_ids[:, 0], batch.labels[:, 0], strict=True)
        if label != -100
    ]
    assert sorted(found) == list(range(min(count, limit or count)))
    assert all(torch.equal(b.labels[b.labels != -100].unique(), torch.tensor([7])) for b in ranks[0])
