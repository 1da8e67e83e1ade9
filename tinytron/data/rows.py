"""Shards whose documents are rows of one length: each row is a sample, and no sample crosses rows.

The manifest has the length of a row. The ``.docs`` file of such a shard has the start of every row and, in a row that is
filled up, the start of its padding.
"""

from __future__ import annotations

import numpy as np

from tinytron.data.shards import Shard
from tinytron.errors import DataError


class FixedRows:
    """The rows of ``shard`` as samples of ``seq_len`` training pairs (a token and the next one). A row of R tokens has
    R - 1 pairs, so ``seq_len`` is R - 1 or more; the rest of a sample is padding.

    Raises: DataError if the rows do not fit, or if the shard does not consist of rows.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        assert shard.row is not None, "only shards with rows are opened as rows"
        self.shard, self.size = shard, shard.row
        if self.size - 1 > seq_len:
            raise DataError(
                f"{shard.path}: its rows of {self.size} tokens do not fit --seq_len {seq_len}; use --seq_len {self.size}"
            )
        if shard.count % self.size:
            raise DataError(f"{shard.path}: {shard.count} tokens are not whole rows of {self.size}; tokenize again")
        self.num_rows = shard.count // self.size

    def length(self, row: int) -> int:
        """Number of tokens of a row before its padding. Raises: DataError if the shard does not tell."""
        first = row * self.size
        starts = self.shard.document_starts
        if starts is None:
            raise DataError(f"{self.shard.path} has rows, but {self.shard.path.stem}.docs is missing; tokenize again")
        low, high = starts.searchsorted(np.array([first + 1, first + self.size], np.uint32))
        return self.size if low == high else int(starts[low]) - first

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """The first token and the number of training pairs of the one piece that a row is; nothing for a single token."""
        length = self.length(row)
        return [(row * self.size, length - 1)] if length > 1 else []
