"""Iterable datasets, whose samples have an order but no random access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

from tinytron.data.batch import Batch, collate, masked
from tinytron.data.loader import micro_batch_rows, sizes_of
from tinytron.errors import DataError
from tinytron.utils.batch_sizes import BatchSizes, Skips


class StreamLoader:
    """This rank's micro-batches of an iterable dataset, which must give every rank the same samples in the same order.

    Each step takes the next ``global_batch`` samples of the stream, or as many as ``BatchSizes`` say, so the order does not
    depend on the layout; each rank skips the rows of the others. When the stream ends it starts again; if the dataset has
    ``set_epoch``, that is called first. To begin at ``start_step``, after what ``skips`` passes over up to it, the loader
    calls ``dataset.skip(n)`` (Hugging Face datasets have it) if there is one, and otherwise reads and drops samples.
    """

    def __init__(
        self, dataset: Iterable[Any], *, global_batch: int | BatchSizes, micro_batch: int, dp_rank: int, dp_size: int
    ) -> None:
        self.dataset, self.sizes, self.micro_batch = dataset, sizes_of(global_batch, micro_batch * dp_size), micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.start_step = 0
        self.skips = Skips()

    def __iter__(self) -> Iterator[Batch]:
        """Endless micro-batches. Raises: DataError if the dataset gives no sample."""
        items = self._walk(self.skips.position(self.start_step, self.sizes))
        for step in count(self.start_step):
            size = self.sizes.at(step)
            mine = set(micro_batch_rows(size, self.micro_batch, self.dp_rank, self.dp_size))
            for row in range(0, size, self.micro_batch):
                rows = list(islice(items, self.micro_batch))
                if row in mine:
                    yield collate(rows)

    def _walk(self, first: int) -> Iterator[Any]:
        """The samples of one epoch after the other, without the first ``first``."""
        skip = getattr(self.dataset, "skip", None)
        epoch = 0
        if first and callable(skip):
            some = False
            for item in skip(first):
                some = True
                yield item
            if some:  # otherwise the stream ended before ``first``
                first, epoch = 0, 1
        while True:
            set_epoch = getattr(self.dataset, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
            read = 0
            for item in self.dataset:
                read += 1
                if read > first:
                    yield item
            if not read:
                raise DataError(f"{type(self.dataset).__name__} gave no sample; it must give some on every pass")
            first, epoch = max(0, first - read), epoch + 1


class ValStreamLoader:
    """This rank's share of the first ``num_samples`` samples of an iterable dataset (``None``: of all samples), each once.

    All ranks get the same number of batches; every label of a missing row is ignored.
    """

    def __init__(
        self, dataset: Iterable[Any], *, num_samples: int | None, micro_batch: int, dp_rank: int, dp_size: int
    ) -> None:
        self.dataset, self.num_samples = dataset, num_samples
        self.micro_batch, self.dp_rank, self.dp_size = micro_batch, dp_rank, dp_size

    def __iter__(self) -> Iterator[Batch]:
        samples = islice(self.dataset, self.num_samples)
        group = self.micro_batch * self.dp_size
        while rows := list(islice(samples, group)):
            here = len(rows)
            rows += [rows[0]] * (group - here)
            first = self.dp_rank * self.micro_batch
            mine = range(first, first + self.micro_batch)
            batch = collate([rows[row] for row in mine])
            yield masked(batch, [row - first for row in mine if row >= here])
