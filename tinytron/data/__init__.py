"""Floor 2: from token shards to samples to batches, in training order. Never imports ``text``."""

from tinytron.data.batch import Batch
from tinytron.data.formats import read_header, write_shard
from tinytron.data.loader import GlobalBatchSampler, build_train_loader, build_val_loader
from tinytron.data.mock import MockDataset
from tinytron.data.order import ShuffledEpochs
from tinytron.data.samples import MixtureDataset, SampleOptions, TokenShardDataset
from tinytron.data.shards import EndOfText, Shard, find_shards

__all__ = [
    "Batch",
    "EndOfText",
    "GlobalBatchSampler",
    "MixtureDataset",
    "MockDataset",
    "SampleOptions",
    "Shard",
    "ShuffledEpochs",
    "TokenShardDataset",
    "build_train_loader",
    "build_val_loader",
    "find_shards",
    "read_header",
    "write_shard",
]
