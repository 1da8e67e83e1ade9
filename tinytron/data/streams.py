"""Iterable datasets, whose samples have an order but no random access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tinytron.data.batch import Batch, collate, masked
from tinytron.data.loader import micro_batch_rows
from tinytron.errors import DataError


class StreamLoader:
    """This rank's micro-batches of an iterable dataset, which must give every rank the same samples in the same order.

    Sample p of the stream is row ``p % global_batch`` of step ``p // global_batch``, so the order does not depend on the
    layout; each rank skips the rows of the others. When the stream ends it starts again; if the dataset has ``set_epoch``,
    that is called first. To begin at ``start_step``, the loader calls ``dataset.skip(n)`` (Hugging Face datasets have
    it) if there is one, and otherwise reads and drops samples.
    """

    def __init__(
        self, dataset: Iterable[Any], *, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int
    ) -> None:
        self.dataset, self.global_batch, self.micro_batch = dataset, global_batch, micro_batch
        mine = micro_batch_rows(global_batch, micro_batch, dp_rank, dp_size)
        self._mine = {row for first in mine for row in range(first, first + micro_batch)}
        self.start_step = 0

    def __iter__(self) -> Iterator[Batch]:
        """Endless micro-batches. Raises: DataError if the dataset gives no sample."""
        first = self.start_step * self.global_batch
        rows: list[Any] = []
        for position, item in enumerate(self._walk(first), start=first):
            if position % self.global_batch in self._mine:
                rows.append(item)
                if len(rows) == self.micro_batch:
                    yield collate(rows)
                    rows = []

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
            count = 0
            for item in self.dataset:
                count += 1
                if count > first:
                    yield item
            if not count:
                raise DataError(f"{type(self.dataset).__name__} gave no sample; it must give some on every pass")
            first, epoch = max(0, first - count), epoch + 1


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
