"""Built-in datasets, and the sampler and loaders for any dataset that a trainer has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tinytron.data import (
    Batch,
    GlobalBatchSampler,
    MixtureDataset,
    MockDataset,
    SampleOptions,
    TokenShardDataset,
    build_train_loader,
    build_val_loader,
)
from tinytron.data.loader import size_of
from tinytron.data.mixture import MixtureOrder
from tinytron.data.mixture_file import read_mixture
from tinytron.data.order import Order, ShuffledEpochs
from tinytron.data.pack_files import make_pack_files
from tinytron.data.remote import fetch_shards, local_dataset_path
from tinytron.data.shards import EndOfText, check_held_out, find_held_out, find_shards, open_shards, passed_over
from tinytron.data.streams import StreamLoader, ValStreamLoader
from tinytron.distributed.agreement import agree, agree_slowly, require_same
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError, DataError
from tinytron.training.config import Config
from tinytron.training.derive import TrainingInfo, data_position
from tinytron.training.world import first_on_node
from tinytron.utils.batch_sizes import Skips
from tinytron.utils.remote import is_remote

MOCK_VAL_OFFSET = 10**9


@dataclass(frozen=True)
class LoadedData:
    """A loader of this rank's micro-batches, the dataset it reads if that is known, and whether the loader is one of
    ``ours``: built-in loaders follow the global order of samples and may be read by a thread."""

    loader: Iterable[Any]
    dataset: Dataset[Any] | None
    ours: bool

    @property
    def trusted(self) -> bool:
        """True if the dataset itself checks lengths and token ids."""
        return self.ours and checks_its_tokens(self.dataset)

    @property
    def has_workers(self) -> bool:
        """True if the loader's own processes read ahead. A stream has none, because each would read the whole stream."""
        return getattr(self.loader, "num_workers", 0) > 0

    @property
    def from_shards(self) -> bool:
        """True if the dataset reads token shards, or is a subset of one that does."""
        return isinstance(whole_of(self.dataset), TokenShardDataset | MixtureDataset)

    @property
    def sources(self) -> list[str]:
        """The names of a mixture's sources, or an empty list."""
        return list(getattr(self.dataset, "names", []))


def builtin_datasets(config: Config, state: ParallelState) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training and validation data, as ``--dataset_path``, ``--val_dataset_path`` or ``--use_mock_data`` say. Collective.

    Shards at a URL are first downloaded, once per node. Raises: DataError on every rank for missing or damaged shards and
    for token ids outside the vocabulary; StorageError if shards cannot be downloaded.
    """
    seq_len, vocab_size = config.train.seq_len, config.model.vocab_size
    if config.data.use_mock_data or config.data.dataset_path is None:
        count, seed = config.data.mock_data_num_samples, config.seed.seed
        mock_val = MockDataset(max(1, count // 10), seq_len, vocab_size, seed, offset=MOCK_VAL_OFFSET)
        return MockDataset(count, seq_len, vocab_size, seed), mock_val
    path, val_path = config.data.dataset_path, config.data.val_dataset_path
    train: TokenShardDataset | MixtureDataset | None
    val: TokenShardDataset | MixtureDataset | None
    if path.endswith(".json"):
        train, val = _mixture(config, state, Path(path.removeprefix("file://")))
    else:
        train = _shards(config, state, path, "train")
        val = None if val_path is not None else _shards(config, state, path, "val")
    assert train is not None, "find_shards refuses a folder without training shards"
    if val_path is not None:
        val = held_out = _shards(config, state, val_path, "val", own=True)
        parts = train.datasets if isinstance(train, MixtureDataset) else [train]
        trained = [shard for part in parts for shard in part.shards]
        agree(lambda: check_held_out(trained, held_out.shards if held_out else []), state.groups["world"])
    return train, val


def _mixture(config: Config, state: ParallelState, path: Path) -> tuple[MixtureDataset, MixtureDataset | None]:
    world = state.groups["world"]
    mixture = agree(lambda: read_mixture(path), world)
    train: dict[str, TokenShardDataset] = {}
    val: dict[str, TokenShardDataset] = {}
    for source in mixture.sources:
        for split, found in (("train", train), ("val", val)):
            if split == "val" and config.data.val_dataset_path is not None:
                continue
            if (dataset := _shards(config, state, source.path, split)) is not None:
                found[source.name] = dataset
    sizes, contents = [len(d) for d in train.values()], [fingerprint(d) for d in train.values()]
    order = agree(lambda: MixtureOrder(mixture, sizes, config.train.seq_len, config.seed.seed, contents), world)
    return MixtureDataset(train, order), MixtureDataset(val) if val else None


def _shards(
    config: Config, state: ParallelState, path: str, split: str, *, own: bool = False
) -> TokenShardDataset | None:
    """The samples of one split of one source; ``None`` if it has no validation shards, or if they hold no sample in a run
    that does not validate. ``own``: ``path`` is for this split alone. Collective."""
    option = "--val_dataset_path" if own else "--dataset_path"
    world, data, seq_len = state.groups["world"], config.data, config.train.seq_len
    if is_remote(path):
        url = path
        if split == "train" or own:
            agree_slowly(lambda: fetch_shards(url, option) if first_on_node() else None, world)
        path = local_dataset_path(url)
    path = path.removeprefix("file://")
    eot = None if data.eot_id is None else EndOfText(data.eot_id, data.eot_position)
    find = partial(find_held_out, path) if own else partial(find_shards, path, split)
    shards = agree(lambda: open_shards(find(), data.token_dtype, eot), world)
    found = [(shard.path.name, shard.count, shard.sha256) for shard in shards]
    require_same(found, world, f"{option} {path} has different {split} shards on some nodes; copy the same ones to all")
    if not shards:
        return None
    packs = data.packing == "best_fit" and shards[0].row is None
    fewest = shards[0].row or (2 if packs else seq_len + 1)
    if split == "val" and all(shard.count < fewest for shard in shards):
        if not validates(config):
            return None
        raise DataError(
            f"--do_val: no validation shard has enough tokens for a sample, {fewest} at --seq_len {seq_len} "
            f"({shards[0].path.name}: {shards[0].count}); hold out more documents, use a shorter --seq_len, or drop "
            "--do_val"
        )
    if packs:
        mine = shards[state.rank :: state.layout.world_size]
        agree_slowly(lambda: make_pack_files(mine, seq_len), world)
        # Nodes that do not share a folder lack the files that ranks on other nodes made.
        agree_slowly(lambda: make_pack_files(shards, seq_len) if first_on_node() else None, world)

    def build() -> TokenShardDataset:
        reading = SampleOptions(
            data.document_mask, data.cross_document_loss, data.packing, mark_padding=config.model.use_moe
        )
        dataset = TokenShardDataset(shards, seq_len, config.model.vocab_size, reading)
        dataset.passed_over = passed_over(path) if split == "train" else []
        dataset.check_token_ids(part=state.rank, parts=state.layout.world_size)
        return dataset

    return agree(build, world)


def validates(config: Config) -> bool:
    """True if a run measures the validation loss."""
    return config.train.do_val and not config.train.debug


def split_off_validation(dataset: Dataset[Any] | None, split_rate: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """The first ``split_rate`` of the samples for training, the rest for validation.

    Raises: ConfigError if either part would be empty, or for data that cannot be split this way.
    """
    if dataset is None or not is_map_style(dataset) or getattr(dataset, "order", None) is not None:
        kind = "your own train_loader" if dataset is None else type(dataset).__name__
        raise ConfigError(
            f"--do_val and --split_rate {split_rate} need validation data, but {kind} cannot be split; set val_dataset "
            "(for token shards: tokenize with --val_fraction 0.005), or drop them"
        )
    count = size_of(dataset)
    first_val = round(count * split_rate)
    if not 0 < first_val < count:
        raise ConfigError(
            f"--split_rate {split_rate} of {count} samples leaves none for training or none for validation; "
            f"use {min(0.99, (count - 1) / count):.6g}, set val_dataset, or drop --do_val"
        )
    return Subset(dataset, range(first_val)), Subset(dataset, range(first_val, count))


def fingerprint(dataset: Any) -> str:
    """A string that identifies the training data: its own ``fingerprint()`` if it has one, else type and size."""
    if isinstance(dataset, Subset):
        return f"first {len(dataset)} of {fingerprint(dataset.dataset)}"
    if callable(own := getattr(dataset, "fingerprint", None)):
        return str(own())
    return f"{type(dataset).__name__}:{len(dataset)}" if hasattr(dataset, "__len__") else type(dataset).__name__


def epoch_size(config: Config, dataset: Dataset[Any] | None, loader: object) -> int | None:
    """Number of samples in one pass over all ranks' data, if known; a user's own loader may have it as ``num_samples``."""
    if dataset is None:
        return getattr(loader, "num_samples", None)
    return order_of(config, dataset).num_samples if is_map_style(dataset) else None


def describe(config: Config, dataset: Dataset[Any] | None, info: TrainingInfo) -> list[str]:
    """Lines about the data of this run that the user should know. Raises: DataError if it ends before the run does."""
    workers = config.data.num_workers
    if workers and dataset is not None and not is_map_style(dataset):
        return [
            f"--num_workers {workers}: {type(dataset).__name__} has no numbered samples to divide among processes, so a "
            f"thread reads it, --prefetch {config.data.prefetch} ahead"
        ]
    if isinstance(dataset, MixtureDataset) and dataset.order is not None:
        samples = info.batch_sizes.before(info.max_steps)
        check_enough(dataset, samples)
        packing = [
            f"  {n}: {line}" for n, d in zip(dataset.names, dataset.datasets, strict=True) for line in d.describe()
        ]
        return [*dataset.order.describe(samples), *packing]
    if isinstance(dataset, TokenShardDataset):
        return dataset.describe()
    return []


def check_enough(dataset: Dataset[Any] | None, samples: int) -> None:
    """Raises: DataError if the plan of a mixture has fewer than ``samples``."""
    if isinstance(dataset, MixtureDataset) and dataset.order is not None:
        dataset.order.counts(samples)


def seen_tokens(config: Config, dataset: Dataset[Any] | None, step: int, skips: Skips) -> dict[str, int]:
    """Tokens of every source of a mixture in the first ``step`` steps, which follow from the plan alone."""
    if not isinstance(dataset, MixtureDataset) or dataset.order is None:
        return {}
    count = dataset.order.counts
    counts = np.array(count(data_position(config, step, skips)["samples"]))
    for first, stop in skips.ranges(config.train.batch_sizes):
        counts = counts - (np.array(count(stop)) - np.array(count(first)))
    return {name: int(count) * config.train.seq_len for name, count in zip(dataset.names, counts, strict=True)}


def identity_of(config: Config, dataset: Any) -> Callable[[int, Skips], str]:
    """A function from a step and the run's skips to a string that identifies the data before it: later data of a mixture
    may be changed."""
    if isinstance(dataset, MixtureDataset) and (order := dataset.order) is not None:
        return lambda step, skips: order.fingerprint(data_position(config, step, skips)["samples"])
    fixed = fingerprint(dataset)
    return lambda step, skips: fixed


def is_map_style(dataset: Dataset[Any]) -> bool:
    """True if samples have numbers; iterable datasets only have an order."""
    return not isinstance(dataset, IterableDataset)


def order_of(config: Config, dataset: Dataset[Any]) -> Order:
    """The dataset's own ``order``, if it has one; else every sample once per epoch, shuffled by the seed."""
    own: Order | None = getattr(dataset, "order", None)
    return own if own is not None else ShuffledEpochs(size_of(dataset), config.seed.seed)


def whole_of(dataset: Dataset[Any] | None) -> Dataset[Any] | None:
    """The dataset that ``dataset`` is a subset of, or itself."""
    return whole_of(dataset.dataset) if isinstance(dataset, Subset) else dataset


def checks_its_tokens(dataset: Dataset[Any] | None) -> bool:
    """True for built-in datasets, which reject token ids outside the vocabulary themselves; a subclass may not."""
    return type(whole_of(dataset)) in (TokenShardDataset, MixtureDataset, MockDataset)


def make_train_loader(
    config: Config, state: ParallelState, info: TrainingInfo, dataset: Dataset[Any] | None
) -> tuple[GlobalBatchSampler | None, StreamLoader | DataLoader[Batch]]:
    """Loader of this rank's micro-batches, and its sampler if the dataset is map-style."""
    share: dict[str, Any] = {
        "global_batch": info.batch_sizes,
        "micro_batch": config.train.batch_size,
        "dp_rank": state.group_rank("dp"),
        "dp_size": state.layout.dp,
    }
    assert dataset is not None, "DataPipeline raises without data"
    if not is_map_style(dataset):
        return None, StreamLoader(cast(Iterable[Any], dataset), **share)
    sampler = GlobalBatchSampler(order_of(config, dataset), **share)
    sampler.stop_step = info.max_steps  # workers that read ahead must not ask an order for more samples than it has
    loader = build_train_loader(
        dataset,
        sampler,
        num_workers=config.data.num_workers,
        pin_memory=config.data.pin_memory,
        ahead=config.data.prefetch * info.grad_accum_steps,
    )
    return sampler, loader


def make_val_loader(config: Config, state: ParallelState, dataset: Dataset[Any]) -> ValStreamLoader | DataLoader[Batch]:
    """Loader of this rank's share of the validation samples, of at most ``max_eval_tokens``."""
    limit = config.train.max_eval_tokens
    samples = None if limit is None else -(-limit // config.train.seq_len)
    share: dict[str, int] = {
        "micro_batch": config.train.batch_size,
        "dp_rank": state.group_rank("dp"),
        "dp_size": state.layout.dp,
    }
    if not is_map_style(dataset):
        return ValStreamLoader(cast(Iterable[Any], dataset), num_samples=samples, **share)
    return build_val_loader(
        dataset,
        num_samples=min(size_of(dataset), samples or size_of(dataset)),
        num_workers=config.data.num_workers,
        pin_memory=config.data.pin_memory,
        **share,
    )
