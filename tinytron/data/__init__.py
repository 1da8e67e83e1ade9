"""Floor 2: token files, samples, and the order in which they are trained on."""

from tinytron.data.formats import read_header, write_shard
from tinytron.data.loader import Batch, GlobalBatchSampler, build_train_loader, build_val_loader
from tinytron.data.mock import MockDataset
from tinytron.data.shards import TokenShardDataset, find_shards

__all__ = [
    "Batch",
    "GlobalBatchSampler",
    "MockDataset",
    "TokenShardDataset",
    "build_train_loader",
    "build_val_loader",
    "find_shards",
    "read_header",
    "write_shard",
]
