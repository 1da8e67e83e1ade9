"""Built-in data sets, and the sampler and loaders made from whatever data set a trainer has."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from tinytron.data import (
    Batch,
    GlobalBatchSampler,
    MockDataset,
    TokenShardDataset,
    build_train_loader,
    build_val_loader,
    find_shards,
)
from tinytron.data.loader import size_of
from tinytron.data.remote import fetch_shards, local_dataset_path
from tinytron.distributed.collectives import together, together_long
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError, DataError
from tinytron.model.modules.loss import IGNORE_INDEX
from tinytron.training.config import Config, TrainingInfo
from tinytron.training.startup import first_on_node
from tinytron.utils.remote import is_remote

MOCK_VAL_OFFSET = 10**9


def builtin_datasets(config: Config, state: ParallelState) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training and validation data as ``--dataset_path`` or ``--use_mock_data`` says. Collective.

    Shards behind a URL are first fetched, once on each node. Raises: DataError on every rank for missing or damaged shards
    and for token ids outside the vocabulary; StorageError if they cannot be fetched.
    """
    seq_len, vocab_size = config.train.seq_len, config.model.vocab_size
    if config.data.use_mock_data or config.data.dataset_path is None:
        count, seed = config.data.mock_data_num_samples, config.seed.seed
        val = MockDataset(max(1, count // 10), seq_len, vocab_size, seed, offset=MOCK_VAL_OFFSET)
        return MockDataset(count, seq_len, vocab_size, seed), val
    path, world = config.data.dataset_path, state.groups["world"]
    if is_remote(path):
        url = path
        together_long(lambda: fetch_shards(url) if first_on_node() else None, world)
        path = local_dataset_path(url)
    path = path.removeprefix("file://")

    def open_split(split: str) -> TokenShardDataset | None:
        shards = find_shards(path, split)
        if not shards:
            return None
        dataset = TokenShardDataset(shards, seq_len, vocab_size)
        dataset.check_token_ids(part=state.rank, parts=state.layout.world_size)
        return dataset

    train, val_shards = together(lambda: (open_split("train"), open_split("val")), world)
    assert train is not None, "find_shards refuses a folder without training shards"
    return train, val_shards


def split_off_validation(dataset: Dataset[Any], split_rate: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """The first ``split_rate`` of the samples to train on, the rest to validate on.

    Raises: ConfigError if either part would be empty.
    """
    count = size_of(dataset)
    first_val = round(count * split_rate)
    if not 0 < first_val < count:
        raise ConfigError(
            f"--split_rate {split_rate} of {count} samples leaves no sample to train or to validate on; "
            f"use {min(0.99, (count - 1) / count):.6g}, give val_dataset, or drop --do_val"
        )
    return Subset(dataset, range(first_val)), Subset(dataset, range(first_val, count))


def fingerprint(dataset: Dataset[Any]) -> str:
    """What identifies the training data: its own ``fingerprint()`` if it has one, else type and size."""
    if isinstance(dataset, Subset):
        return f"first {len(dataset)} of {fingerprint(dataset.dataset)}"
    own = getattr(dataset, "fingerprint", None)
    return str(own()) if callable(own) else f"{type(dataset).__name__}:{size_of(dataset)}"


def make_train_loader(
    config: Config, state: ParallelState, info: TrainingInfo, dataset: Dataset[Any]
) -> tuple[GlobalBatchSampler, DataLoader[Batch]]:
    """Sampler and loader of this rank's micro-batches."""
    sampler = GlobalBatchSampler(
        size_of(dataset),
        global_batch=info.global_batch_samples,
        micro_batch=config.train.batch_size,
        dp_rank=state.group_rank("dp"),
        dp_size=state.layout.dp,
        seed=config.seed.seed,
    )
    workers, pin = config.data.num_workers, config.data.pin_memory
    return sampler, build_train_loader(dataset, sampler, num_workers=workers, pin_memory=pin)


def make_val_loader(config: Config, state: ParallelState, dataset: Dataset[Any]) -> DataLoader[Batch]:
    """Loader of this rank's share of the validation samples."""
    return build_val_loader(
        dataset,
        micro_batch=config.train.batch_size,
        dp_rank=state.group_rank("dp"),
        dp_size=state.layout.dp,
        num_workers=config.data.num_workers,
        pin_memory=config.data.pin_memory,
    )


def check_batch(batch: Batch, seq_len: int, vocab_size: int) -> None:
    """Raises: DataError for samples of another length than ``seq_len`` (the global batch would not be what was asked for)
    and for token ids the model has no embedding for (on a GPU they would end in a device assertion).

    Reads host memory, before the batch goes to the device.
    """
    if batch.input_ids.shape[1] != seq_len:
        raise DataError(
            f"the dataset gave samples of {batch.input_ids.shape[1]} tokens, but --seq_len is {seq_len}; make them alike"
        )
    ids = torch.cat([batch.input_ids.flatten(), batch.labels[batch.labels != IGNORE_INDEX]])
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        advice = f"mark labels to ignore with {IGNORE_INDEX}" if low < 0 else "set --vocab_size to the tokenizer's"
        raise DataError(f"the dataset gave token id {low if low < 0 else high}, outside 0..{vocab_size - 1}; {advice}")
