"""From samples to the micro-batches of a step. The samples of global step t are a function of (data, seed, t) alone;
a layout decides only who computes which rows, so one integer is the whole state of the loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tinytron.data.permutation import Permutation
from tinytron.errors import DataError
from tinytron.model.modules.loss import IGNORE_INDEX
from tinytron.utils.signals import obey_only_the_parent


class Batch(NamedTuple):
    """One micro-batch: token ids and already shifted labels, int64 ``[B, S]``."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; asynchronous from pinned memory."""
        return Batch(*(t.to(device, non_blocking=True) for t in self))


def as_batch(item: Any) -> Batch:
    """What a loader of the user's own gave: a ``Batch``, a dict with ``input_ids`` and ``labels``, or the two in a row."""
    if isinstance(item, Batch):
        return item
    pair = [item.get("input_ids"), item.get("labels")] if isinstance(item, dict) else item
    if not (
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(torch.is_tensor(t) and t.ndim == 2 for t in pair)
    ):
        raise DataError(
            "a loader must give input_ids and labels, integer tensors [B, S]: a dict, a pair, or a data.Batch"
        )
    return Batch(*(t.long() for t in pair))


class GlobalBatchSampler(Sampler[list[int]]):
    """Sample numbers of this data-parallel rank's micro-batches, from ``start_step`` on without end.

    The samples are walked epoch by epoch, each epoch in an order of its own given by (seed, epoch); step t takes
    positions ``t * global_batch .. (t + 1) * global_batch - 1`` of that walk. Micro-batch m of rank r holds the rows
    ``(m * dp_size + r) * micro_batch ..`` of the step. Sizes are in samples.
    """

    def __init__(
        self, num_samples: int, *, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int, seed: int
    ) -> None:
        assert global_batch % (micro_batch * dp_size) == 0, "the global batch must divide into micro-batches"
        self.num_samples, self.global_batch, self.micro_batch = num_samples, global_batch, micro_batch
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed
        self.start_step = 0

    def samples_of_step(self, step: int) -> list[int]:
        """The sample numbers of global step ``step`` (counted from 0), the same on every rank."""
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        epochs, within = positions // self.num_samples, positions % self.num_samples
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = Permutation(self.num_samples, self.seed, int(epoch))(within[chosen])
        return cast(list[int], samples.tolist())

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            samples = self.samples_of_step(step)
            for first in range(self.dp_rank * self.micro_batch, self.global_batch, self.micro_batch * self.dp_size):
                yield samples[first : first + self.micro_batch]
            step += 1


class _ValSampler(Sampler[list[int]]):
    """Every sample once, in order, dealt to the ranks in micro-batches; -1 stands for a row that is not there.

    All ranks get the same number of batches, so that a model with collectives in its forward never waits in vain.
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
    """``dataset`` with sample -1: the first sample with every label ignored."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= 0:
            return _as_sample(self.dataset[index])
        first = _as_sample(self.dataset[0])
        return {"input_ids": first["input_ids"], "labels": torch.full_like(first["labels"], IGNORE_INDEX)}


def _as_sample(item: Any) -> dict[str, torch.Tensor]:
    """A dataset item as ``{input_ids, labels}``: given so, or made from ``seq_len + 1`` contiguous token ids."""
    if isinstance(item, dict):
        if missing := {"input_ids", "labels"} - item.keys():
            raise DataError(f"a dataset item has keys {sorted(item)} but lacks {sorted(missing)}")
        return {key: torch.as_tensor(item[key]) for key in ("input_ids", "labels")}
    tokens = torch.as_tensor(item)
    if tokens.ndim != 1:
        raise DataError(
            f"a dataset item must be a dict or a row of seq_len + 1 token ids, not shape {list(tokens.shape)}"
        )
    return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def _collate(items: Sequence[Any]) -> Batch:
    samples = [_as_sample(item) for item in items]
    lengths = {len(tensor) for sample in samples for tensor in sample.values()}
    if len(lengths) != 1:
        raise DataError(
            f"the input_ids and labels of a micro-batch have different lengths {sorted(lengths)}; cut or pad them alike"
        )
    return Batch(*(torch.stack([s[key] for s in samples]).long() for key in ("input_ids", "labels")))


def size_of(dataset: Dataset[Any]) -> int:
    """Number of samples. Raises: DataError for a dataset that has no length or no sample."""
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no __len__: training needs a map-style dataset (write the stream to token "
            "shards first, as pretrain_example.py does)"
        )
    if not (count := len(cast(Sized, dataset))):
        raise DataError(f"{type(dataset).__name__} is empty")
    return count


def build_train_loader(
    dataset: Dataset[Any], sampler: GlobalBatchSampler, *, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Micro-batches of this rank without end, in the sampler's order whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # or every start would draw from the generator that dropout uses
        worker_init_fn=obey_only_the_parent,
        persistent_workers=num_workers > 0,
    )


def build_val_loader(
    dataset: Dataset[Any], *, micro_batch: int, dp_rank: int, dp_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """This rank's share of every sample once, in order."""
    return DataLoader(
        _OrMasked(dataset),
        batch_sampler=_ValSampler(size_of(dataset), micro_batch, dp_rank, dp_size),
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # or every start would draw from the generator that dropout uses
        worker_init_fn=obey_only_the_parent,
    )
