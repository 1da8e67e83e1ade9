"""Pairs of rows, the better and the worse answer to the same prompt, from the shards of a folder.

train.pos_000000.bin   rows of the better answers, train.neg_000000.bin of the worse ones: row i of both are a pair
train.pos_000000.docs  .weights, and the same for the others: see shards.py and rows.py
manifest.json          says that the shards are paired, and how long a row is
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from tinytron.data.manifest import read_manifest
from tinytron.data.rows import FixedRows
from tinytron.data.shards import open_shards
from tinytron.errors import DataError
from tinytron.utils.sequences import IGNORE_INDEX

POSITIVE, NEGATIVE = "pos", "neg"


class TokenRow(NamedTuple):
    """A row of tokens: ``ids``, int64 ``[R]``, and how much each of them counts as a target, float32 ``[R]``. Tokens from
    ``length`` on are padding, whose weight is 0."""

    ids: torch.Tensor
    weights: torch.Tensor
    length: int


class Pair(NamedTuple):
    """The rows of the better and the worse answer."""

    chosen: TokenRow
    rejected: TokenRow


class PairDataset(Dataset[Pair]):
    """The pairs of a ``split`` (``train`` or ``val``) of the ``folder``, in the order in which they were written.

    Raises: DataError if the folder has no pairs, or if its two sides do not have the same rows; on access for a token id of
    ``vocab_size`` or more, if that is given.
    """

    def __init__(self, folder: str | Path, split: str = "train", vocab_size: int | None = None) -> None:
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None or not manifest.paired or manifest.row is None:
            raise DataError(f"{folder} has no pairs; make them with the job data/tokenize_contrastive_dataset")
        self.row_size, self.vocab_size = manifest.row, vocab_size
        self.chosen, self.rejected = (self._open(folder, f"{split}.{side}") for side in (POSITIVE, NEGATIVE))
        counts, others = ([rows.num_rows for rows in side] for side in (self.chosen, self.rejected))
        if counts != others:
            raise DataError(
                f"{folder}: the shards {split}.{POSITIVE}_*.bin have {counts} rows, but {split}.{NEGATIVE}_*.bin have "
                f"{others}; row i of both must be a pair: tokenize again"
            )
        if not counts:
            raise DataError(f"{folder} has no pairs for {split}; hold out more of them with data.val_pct=0.1")
        self.ends = list(accumulate(counts))

    def fingerprint(self) -> str:
        """A hash that identifies the pairs, independent of their path."""
        digest = hashlib.sha256()
        for rows in (*self.chosen, *self.rejected):
            known = f"{rows.shard.count}:{rows.shard.sha256};".encode() if rows.shard.sha256 else None
            digest.update(known or rows.shard.fingerprint(self.row_size))
        return f"pairs:{digest.hexdigest()[:16]}"

    def _open(self, folder: Path, name: str) -> list[FixedRows]:
        return [FixedRows(shard, self.row_size) for shard in open_shards(sorted(folder.glob(f"{name}_*.bin")))]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Pair:
        index = range(len(self))[index]
        number = bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        return Pair(self._row(self.chosen[number], row), self._row(self.rejected[number], row))

    def _row(self, rows: FixedRows, row: int) -> TokenRow:
        place = slice(row * rows.size, (row + 1) * rows.size)
        weights = rows.shard.weights
        if weights is None:
            raise DataError(f"{rows.shard.path} has no {rows.shard.path.stem}.weights; tokenize again")
        ids = torch.from_numpy(rows.shard.tokens[place].astype("int64"))
        if self.vocab_size is not None and int(ids.max()) >= self.vocab_size:
            raise DataError(
                f"{rows.shard.path}: token id {int(ids.max())} in row {row} is not below --vocab_size {self.vocab_size}"
            )
        return TokenRow(ids, torch.from_numpy(weights[place].copy()), rows.length(row))


CHOSEN_SIDE, REJECTED_SIDE = 1, -1
REFERENCE, SIDE, NUMBER = "reference", "side", "number"  # keys of a sample


class PackedPairs(Dataset[dict[str, torch.Tensor]]):
    """Samples of ``seq_len`` tokens, each a pair: the better answer with its prompt, then the worse one as a document of
    its own, then padding. Both have ``row_size`` - 1 training pairs.

    Keys beyond those of every sample: ``side``, float32 ``[S]``, the weight of every target, negative in the worse answer;
    ``number``, the index of the pair; and ``reference``, the log-probabilities of both answers under the reference, which
    are set later (float64 ``[N, 2]``). Raises: DataError if a pair is longer than ``seq_len``.
    """

    def __init__(self, pairs: PairDataset, seq_len: int) -> None:
        self.pairs, self.seq_len, self.reference = pairs, seq_len, torch.zeros(len(pairs), 2, dtype=torch.float64)
        self.half = pairs.row_size - 1
        if 2 * self.half > seq_len:
            raise DataError(
                f"pairs of rows of {pairs.row_size} tokens need --seq_len {2 * self.half} or more, but it is {seq_len}"
            )

    def fingerprint(self) -> str:
        """That of the pairs."""
        return self.pairs.fingerprint()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pair = self.pairs[index]
        sample = {name: torch.zeros(self.seq_len, dtype=torch.int64) for name in ("input_ids", "labels", "positions")}
        sample["labels"].fill_(IGNORE_INDEX)
        sample[SIDE] = torch.zeros(self.seq_len)
        sample["padding"] = torch.ones(self.seq_len, dtype=torch.bool)
        for start, row, side in ((0, pair.chosen, CHOSEN_SIDE), (self.half, pair.rejected, REJECTED_SIDE)):
            part = slice(start, start + self.half)
            weights = row.weights[1:]
            sample["input_ids"][part] = row.ids[:-1]
            sample["labels"][part] = row.ids[1:].masked_fill(weights == 0, IGNORE_INDEX)
            sample["positions"][part] = torch.arange(self.half)
            sample["padding"][part][: row.length] = False
            sample[SIDE][part] = side * weights
        rest = self.seq_len - 2 * self.half
        sample["positions"][self.seq_len - rest :] = torch.arange(rest)
        return {**sample, NUMBER: torch.tensor(index), REFERENCE: self.reference[index]}
