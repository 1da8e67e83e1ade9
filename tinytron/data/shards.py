"""Token shards: which files belong to a split, and the samples in them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from tinytron.data.formats import open_shard
from tinytron.errors import DataError


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
        mapped = cast(np.memmap[Any, Any], self.shards[shard])
        offset = mapped.offset + at * mapped.dtype.itemsize
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
