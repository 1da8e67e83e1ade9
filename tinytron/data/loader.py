"""From samples to the micro-batches of a step. The samples of global step t depend only on (data, seed, t); the parallel
layout decides only which rank computes which rows, so a single integer is the whole state of the loader.

order: position -> sample   GlobalBatchSampler: step -> this rank's rows   DataLoader: rows -> Batch   Prefetcher: ahead
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tinytron.data.batch import Batch, collate, masked
from tinytron.data.order import Order
from tinytron.errors import DataError
from tinytron.utils.batch_sizes import BatchSizes, Skips
from tinytron.utils.signals import ignore_group_signals

_AHEAD = 2**14  # positions looked up in the order at once: one at a time, that takes longer than reading the rows


def micro_batch_rows(global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> range:
    """The first row of each of this rank's micro-batches within a step: micro-batch m of rank r begins at row
    ``(m * dp_size + r) * micro_batch``."""
    return range(dp_rank * micro_batch, global_batch, micro_batch * dp_size)


def sizes_of(global_batch: int | BatchSizes, unit: int) -> BatchSizes:
    """``global_batch`` as sizes by step, each of which must be a multiple of ``unit``."""
    sizes = BatchSizes(global_batch) if isinstance(global_batch, int) else global_batch
    assert all(size % unit == 0 for size in sizes.sizes()), "the global batch must divide into micro-batches"
    return sizes


class GlobalBatchSampler(Sampler[list[int]]):
    """Sample numbers of this data-parallel rank's micro-batches, from ``start_step`` to ``stop_step`` (None: endless).

    Each step takes the next ``global_batch`` positions of ``order``, or as many as ``BatchSizes`` say, after those that
    ``skips`` passes over. Sizes are in samples.
    """

    def __init__(
        self, order: Order, *, global_batch: int | BatchSizes, micro_batch: int, dp_rank: int, dp_size: int
    ) -> None:
        self.sizes = sizes_of(global_batch, micro_batch * dp_size)
        self.order, self.global_batch, self.micro_batch = order, self.sizes.full, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.start_step = 0
        self.stop_step: int | None = None
        self.skips = Skips()

    def samples_of_step(self, step: int) -> list[int]:
        """The sample numbers of global step ``step`` (counted from 0), the same on every rank."""
        positions = self.skips.position(step, self.sizes) + np.arange(self.sizes.at(step), dtype=np.int64)
        return cast(list[int], self.order(positions).tolist())

    def __iter__(self) -> Iterator[list[int]]:
        for first, stop in self.sizes.runs(self.start_step, math.inf if self.stop_step is None else self.stop_step):
            step = first
            while step < stop:
                steps = int(min(max(1, _AHEAD // self.sizes.at(step)), stop - step))
                yield from self._batches(step, steps)
                step += steps

    def _batches(self, step: int, steps: int) -> list[list[int]]:
        """This rank's micro-batches of the next ``steps`` steps, all of one size, starting at ``step``."""
        size = self.sizes.at(step)
        first = micro_batch_rows(size, self.micro_batch, self.dp_rank, self.dp_size)
        skipped = np.array([self.skips.before(step + n) for n in range(steps)], dtype=np.int64)
        starts = np.add.outer(self.sizes.before(step) + skipped + np.arange(steps, dtype=np.int64) * size, first)
        positions = np.add.outer(starts.ravel(), np.arange(self.micro_batch))
        return cast(list[list[int]], self.order(positions.ravel()).reshape(positions.shape).tolist())


class _ValSampler(Sampler[list[int]]):
    """Yields every sample once, in order, dealt to the ranks in micro-batches; -1 stands for a missing row.

    All ranks get the same number of batches; otherwise a model with collectives in its forward pass would deadlock.
    """

    def __init__(self, num_samples: int, micro_batch: int, dp_rank: int, dp_size: int) -> None:
        self.num_samples, self.micro_batch, self.dp_rank, self.dp_size = num_samples, micro_batch, dp_rank, dp_size

    def __len__(self) -> int:
        return -(-self.num_samples // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.dp_size + self.dp_rank) * self.micro_batch
            yield [i if i < self.num_samples else -1 for i in range(first, first + self.micro_batch)]


class _OrMasked(Dataset[Any]):
    """``dataset`` with an additional sample -1: the first sample with every label ignored."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = collate(fetch(self.dataset, [max(0, index) for index in indices]))
        return masked(batch, [row for row, index in enumerate(indices) if index < 0])


def fetch(dataset: Dataset[Any], indices: list[int]) -> Any:
    """The samples ``indices``: all at once if the dataset has ``__getitems__``, else one by one."""
    at_once = getattr(dataset, "__getitems__", None)
    return at_once(indices) if callable(at_once) else [dataset[index] for index in indices]


def size_of(dataset: Dataset[Any]) -> int:
    """Number of samples. Raises: DataError for a dataset that has no length or no sample."""
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no __len__; give it one, or make it a torch.utils.data.IterableDataset"
        )
    if not (count := len(cast(Sized, dataset))):
        raise DataError(f"{type(dataset).__name__} is empty")
    return count


def build_train_loader(
    dataset: Dataset[Any], sampler: GlobalBatchSampler, *, num_workers: int, pin_memory: bool, ahead: int = 0
) -> DataLoader[Batch]:
    """Endless micro-batches of this rank, in the sampler's order for any number of workers. The workers together keep at
    least ``ahead`` micro-batches ready."""
    if num_workers == 0:
        return _loader(dataset, sampler, 0, pin_memory)
    each = max(2, -(-ahead // num_workers))  # 2 is torch's default
    return _loader(dataset, sampler, num_workers, pin_memory, persistent_workers=True, prefetch_factor=each)


def build_val_loader(
    dataset: Dataset[Any],
    *,
    num_samples: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """This rank's share of the first ``num_samples`` samples, each once, in order."""
    sampler = _ValSampler(num_samples, micro_batch, dp_rank, dp_size)
    return _loader(_OrMasked(dataset), sampler, num_workers, pin_memory)


def _loader(
    dataset: Dataset[Any], sampler: Sampler[list[int]], num_workers: int, pin_memory: bool, **options: Any
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # without one, every pass would draw from the generator that dropout uses
        worker_init_fn=ignore_group_signals,
        **options,
    )
