"""Token files in the timl v1 format: 256 little-endian int32 of header, then raw token ids.

header[0] = 20250805 (magic)   [1] = 1 (version)   [2] = dtype id (0 uint16, 1 uint32)   [3] = number of tokens
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from tinytron.errors import DataError
from tinytron.utils.training import write_atomically

MAGIC, VERSION = 20250805, 1
HEADER_BYTES = 1024
TOKEN_DTYPES: tuple[np.dtype[Any], ...] = (np.dtype("<u2"), np.dtype("<u4"))
MAX_TOKENS = 2**31 - 1  # the count is an int32


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says it holds."""

    dtype: np.dtype[Any]
    count: int


def read_header(path: Path) -> ShardHeader:
    """Read and check the header and the file's length.

    Raises: DataError naming the file and the byte offset of what is wrong.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --dataset_path") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {len(raw)} bytes are no token shard: its header alone has {HEADER_BYTES}")
    magic, version, dtype_id, count = (int(v) for v in np.frombuffer(raw, "<i4", 4))
    if magic != MAGIC:
        raise DataError(f"{path}: magic number {magic} at byte 0, expected {MAGIC}: not a timl v1 token shard")
    if version != VERSION:
        raise DataError(f"{path}: version {version} at byte 4, only version {VERSION} is known")
    if not 0 <= dtype_id < len(TOKEN_DTYPES):
        raise DataError(f"{path}: dtype id {dtype_id} at byte 8, expected 0 (uint16) or 1 (uint32)")
    expected = HEADER_BYTES + count * TOKEN_DTYPES[dtype_id].itemsize
    if count < 0 or size != expected:
        raise DataError(
            f"{path}: the header (byte 12) promises {count} tokens, so {expected} bytes, but the file has {size}: "
            "it is truncated or damaged; write it again"
        )
    return ShardHeader(TOKEN_DTYPES[dtype_id], count)


def open_shard(path: Path) -> npt.NDArray[Any]:
    """The tokens of a shard as a read-only memory map. Raises: DataError as ``read_header``."""
    header = read_header(path)
    if header.count == 0:
        return np.empty(0, header.dtype)
    return np.memmap(path, header.dtype, mode="r", offset=HEADER_BYTES, shape=(header.count,))


def write_shard(path: Path, tokens: npt.ArrayLike, dtype: npt.DTypeLike = np.uint16) -> None:
    """Write token ids as one shard; the file appears whole or not at all.

    Raises: DataError for more than 2^31 - 1 tokens, ids that are no integers, or an id that ``dtype`` cannot hold.
    """
    tokens, target = np.asarray(tokens), np.dtype(dtype).newbyteorder("<")
    if target not in TOKEN_DTYPES:
        raise DataError(f"token dtype {target} is not one of uint16, uint32")
    if tokens.size and tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: token ids must be integers, not {tokens.dtype}")
    if tokens.size > MAX_TOKENS:
        raise DataError(f"{path}: {tokens.size} tokens exceed the {MAX_TOKENS} of one shard; write several")
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(target).max):
        raise DataError(f"{path}: token ids {tokens.min()}..{tokens.max()} do not fit {target}; use uint32")
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = MAGIC, VERSION, TOKEN_DTYPES.index(target), tokens.size
    write_atomically(path, lambda file: (file.write(header.tobytes()), file.write(tokens.astype(target).tobytes())))


def find_shards(dataset_path: str, split: str) -> list[Path]:
    """The shards of ``split``, ``train`` or ``val``, sorted: ``<split>_*.bin`` of a folder, or of those a glob pattern
    matches the ones named ``val_*`` for ``val`` and all others for ``train``.

    Raises: DataError if there is no such folder, or it has no training shard.
    """
    folder = Path(dataset_path)
    if folder.is_dir():
        shards = sorted(folder.glob(f"{split}_*.bin"))
        if not shards and split == "train":
            raise DataError(f"--dataset_path {dataset_path} has no train_*.bin; name a folder with token shards")
        return shards
    matches = sorted(Path(p) for p in glob.glob(dataset_path))
    shards = [p for p in matches if p.name.startswith("val_") == (split == "val")]
    if not shards and split == "train":
        raise DataError(
            f"--dataset_path {dataset_path} is no folder and matches no file; "
            "give a folder with train_*.bin and val_*.bin, or a pattern such as 'shards/train_*.bin'"
        )
    return shards


class TokenShardDataset(Dataset[dict[str, torch.Tensor]]):
    """Sample i of a shard is ``tokens[i*S : i*S + S + 1]``, S = ``seq_len``: neighbours share one token, so every token
    but a shard's first is a target once; the remainder is dropped and no sample crosses shards.

    Samples are numbered through the shards in the given order. Raises: DataError for a damaged shard, for shards without
    a single sample, and on access for a token id of ``vocab_size`` or more.
    """

    def __init__(self, paths: Sequence[Path], seq_len: int, vocab_size: int) -> None:
        self.paths, self.seq_len, self.vocab_size = list(paths), seq_len, vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        counts = [max(0, len(shard) - 1) // seq_len for shard in self.shards]
        self.ends = np.cumsum(counts)
        if not len(self):
            sizes = ", ".join(f"{p.name}: {len(s)}" for p, s in zip(self.paths, self.shards, strict=True))
            raise DataError(
                f"no shard holds one sample of --seq_len {seq_len} + 1 tokens ({sizes} tokens); use a shorter --seq_len"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        first = (index - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len
        tokens = torch.from_numpy(self.shards[shard][first : first + self.seq_len + 1].astype(np.int64))
        if int(tokens.max()) >= self.vocab_size:
            self._refuse(shard, first, tokens.numpy())
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def _refuse(self, shard: int, first: int, tokens: npt.NDArray[Any]) -> None:
        at = first + int(np.argmax(tokens >= self.vocab_size))
        offset = HEADER_BYTES + at * self.shards[shard].dtype.itemsize
        raise DataError(
            f"{self.paths[shard]}: token id {int(self.shards[shard][at])} at byte {offset} is not below --vocab_size "
            f"{self.vocab_size}; use the vocabulary size of the tokenizer that wrote it"
        )

    def check_token_ids(self, part: int = 0, parts: int = 1, limit: int = 2**28) -> None:
        """Look for ids outside the vocabulary in every ``parts``-th shard: all tokens, or if those are more than ``limit``
        about as many, evenly spread (the rest is checked on access). Raises: DataError naming file, byte and id."""
        mine = range(part, len(self.shards), parts)
        block = 2**18
        stride = block * max(1, -(-sum(len(self.shards[n]) for n in mine) // limit))
        for number in mine:
            shard = self.shards[number]
            for first in range(0, len(shard), stride):
                tokens = shard[first : first + block]
                if int(tokens.max()) >= self.vocab_size:
                    self._refuse(number, first, tokens)

    def fingerprint(self) -> str:
        """A hash of sizes, dtypes and the first and last 64 KiB of every shard, but not of where they lie."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{len(shard)}:{shard.dtype}:{self.seq_len};".encode())
            digest.update(shard[: 2**15].tobytes() + shard[-(2**15) :].tobytes())
        return f"shards:{digest.hexdigest()[:16]}"
