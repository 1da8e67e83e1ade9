"""Data loaders as plain functions: ``fn(file_pattern, per_device_batch_size, block_size)`` returns an iterator of
dictionaries of tensors. This is timl's interface, for training code that comes with such functions.

B is ``per_device_batch_size``, S is ``block_size``. A global batch is contiguous: it is the next ``ranks * B * S``
tokens of a file, and rank r reads the r-th part. Files are read in the order of their names; the end of a file that is
too short for a global batch is dropped. Nothing is shuffled.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tinytron.data.formats import TOKEN_DTYPES, WEIGHT_DTYPES, open_shard, open_weights, read_header
from tinytron.errors import ConfigError, DataError
from tinytron.utils.sequences import IGNORE_INDEX

DataLoaderFn = Callable[[str, int, int], Iterator[dict[str, torch.Tensor]]]
_LARGEST_ID = 2**31 - 1  # ids are returned as int32


def data_loader(
    file_pattern: str, per_device_batch_size: int, block_size: int, group: dist.ProcessGroup | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's ``{"input_ids": int32 [B, S], "labels": int64 [B, S]}`` of every global batch, with labels shifted by
    one.

    The last token of a file has no next token, so its label is -100. ``group`` has the ranks that share a global batch
    (default: all; without torch.distributed, one). Raises: ConfigError for sizes below 1; DataError for a pattern that
    matches no files, if every file holds less than one global batch, for damaged files, and for ids above 2^31 - 1.
    """
    parts = _parts(file_pattern, per_device_batch_size, block_size, TOKEN_DTYPES, group)
    return (_tokens(path, values, per_device_batch_size, block_size) for path, values in parts)


def data_loader_floats(
    file_pattern: str, per_device_batch_size: int, block_size: int, group: dist.ProcessGroup | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's ``{"weights": float32 [B, S]}`` of every global batch, from files with one float32 for every token.

    The weights line up with the labels that ``data_loader`` reads from token files of the same lengths; the weight of a
    missing label is 0. Raises: as ``data_loader``.
    """
    parts = _parts(file_pattern, per_device_batch_size, block_size, WEIGHT_DTYPES, group)
    return (
        {"weights": torch.from_numpy(_shifted(values, per_device_batch_size, block_size, np.float32(0)))}
        for _, values in parts
    )


def get_num_tokens(file_pattern: str) -> int:
    """Number of tokens in all files of the pattern, according to their headers. Raises: DataError if no file matches, or
    one is damaged."""
    return sum(count for _, count in _counts(file_pattern, TOKEN_DTYPES))


class FunctionLoader:
    """A loader function and its arguments. It can be iterated any number of times: each epoch calls the function again.

    ``num_samples`` assumes token files that the ranks of ``group`` read as ``data_loader`` does.
    """

    def __init__(
        self,
        fn: DataLoaderFn,
        file_pattern: str,
        per_device_batch_size: int,
        block_size: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.fn, self.file_pattern, self.group = fn, file_pattern, group
        self.per_device_batch_size, self.block_size = per_device_batch_size, block_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.fn(self.file_pattern, self.per_device_batch_size, self.block_size))

    @property
    def num_samples(self) -> int:
        """Number of rows of ``block_size`` tokens that all ranks together read in an epoch, according to the headers.
        Raises: DataError and ConfigError as ``data_loader``."""
        _, world = _rank_and_world(self.group)
        rows = world * self.per_device_batch_size
        files = _long_enough(self.file_pattern, self.per_device_batch_size, self.block_size, TOKEN_DTYPES, world)
        return sum(count // (rows * self.block_size) * rows for _, count in files)


def _rank_and_world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def _counts(file_pattern: str, dtypes: tuple[np.dtype[Any], ...]) -> list[tuple[Path, int]]:
    files = sorted(Path(name) for name in glob.glob(file_pattern))
    if not files:
        raise DataError(f"the pattern {file_pattern!r} matches no file; use one such as 'shards/train_*.bin'")
    return [(path, read_header(path, dtypes=dtypes).count) for path in files]


def _long_enough(
    file_pattern: str, batch: int, block: int, dtypes: tuple[np.dtype[Any], ...], world: int
) -> list[tuple[Path, int]]:
    """The files that hold at least one global batch, with their lengths."""
    for name, value in (("per_device_batch_size", batch), ("block_size", block)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1; use {8 if name.startswith('per') else 1024}")
    files = _counts(file_pattern, dtypes)
    needed = world * batch * block
    found = [(path, count) for path, count in files if count >= needed]
    if not found:
        path, count = max(files, key=lambda file: file[1])
        raise DataError(
            f"no file of {file_pattern!r} holds one global batch of {world} ranks x {batch} x {block} = {needed} values: "
            f"the longest, {path.name}, has {count}; use a smaller per_device_batch_size or block_size"
        )
    return found


def _parts(
    file_pattern: str, batch: int, block: int, dtypes: tuple[np.dtype[Any], ...], group: dist.ProcessGroup | None
) -> Iterator[tuple[Path, npt.NDArray[Any]]]:
    """This rank's values of every global batch, plus the next value if the file has one. The arguments are checked at once,
    before the first value is read."""
    rank, world = _rank_and_world(group)
    files = _long_enough(file_pattern, batch, block, dtypes, world)
    own = batch * block

    def read() -> Iterator[tuple[Path, npt.NDArray[Any]]]:
        for path, _ in files:
            values = open_shard(path) if dtypes is TOKEN_DTYPES else open_weights(path)
            for first in range(rank * own, len(values) - (world - rank) * own + 1, world * own):
                yield path, values[first : first + own + 1]

    return read()


def _tokens(path: Path, values: npt.NDArray[Any], batch: int, block: int) -> dict[str, torch.Tensor]:
    if int(values.max()) > _LARGEST_ID:
        raise DataError(
            f"{path}: token id {int(values.max())} is above {_LARGEST_ID}; the file is damaged, write it again"
        )
    inputs = values[: batch * block].astype(np.int32).reshape(batch, block)
    labels = _shifted(values, batch, block, np.int64(IGNORE_INDEX))
    return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}


def _shifted(values: npt.NDArray[Any], batch: int, block: int, missing: np.generic) -> npt.NDArray[Any]:
    """``values`` shifted left by one, ``[B, S]``, in the type of ``missing``, which fills the end if values run out."""
    shifted = np.full(batch * block, missing, missing.dtype)
    shifted[: len(values) - 1] = values[1:]
    return shifted.reshape(batch, block)
