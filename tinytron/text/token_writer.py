"""Writes documents' tokens into shards of equal size; tokens that are not in a shard yet are carried over to the next run.

Next to ``<split>_<index>.bin`` is ``<split>_<index>.docs``, a timl v1 file of uint32: the offsets in that shard at which
documents begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinytron.data.formats import FileFormat, write_shard
from tinytron.data.manifest import ShardFacts
from tinytron.data.shards import names_gone
from tinytron.errors import DataError
from tinytron.utils.training import sha256_of

Array = npt.NDArray[Any]


class Tokens(NamedTuple):
    """The ids of some documents, one after the other, and each one's number of them. Shapes: [tokens], [documents]."""

    ids: Array
    lengths: npt.NDArray[np.uint32]

    @classmethod
    def none(cls, dtype: np.dtype[Any]) -> Tokens:
        """No documents."""
        return cls(np.empty(0, dtype), np.empty(0, np.uint32))

    @classmethod
    def joined(cls, batches: Sequence[Tokens]) -> Tokens:
        """The tokens of all ``batches``, of which there is at least one."""
        return cls(np.concatenate([made.ids for made in batches]), np.concatenate([made.lengths for made in batches]))

    def first(self, documents: int) -> Tokens:
        """The tokens of the first ``documents``."""
        lengths = self.lengths[:documents]
        return Tokens(self.ids[: int(lengths.sum(dtype=np.int64))], lengths)


def shard_name(split: str, index: int) -> str:
    """``train_000000.bin``."""
    return f"{split}_{index:06d}.bin"


@dataclass
class SplitWriter:
    """The shards of one split, with ``size`` tokens each but the last. Shards before ``first`` are not written; those after
    ``last`` are left for a later run.

    ``pending`` are tokens that are in no shard yet, ``starts`` the offsets of documents that begin among them, counted from
    the first pending token.
    """

    folder: Path
    split: str
    dtype: np.dtype[Any]
    file_format: FileFormat
    size: int
    first: int = 0
    last: int | None = None
    index: int = 0  # number of the next shard
    shards: list[ShardFacts] = field(default_factory=list)
    pending: list[Array] = field(default_factory=list)
    starts: list[Array] = field(default_factory=list)
    held: int = 0  # number of tokens in pending

    def add(self, made: Tokens) -> None:
        """Append the tokens of some documents; those without tokens are left out."""
        lengths = made.lengths[made.lengths > 0]
        if len(lengths):
            ends = np.cumsum(lengths, dtype=np.int64)
            self.starts.append(np.concatenate(([0], ends[:-1])) + self.held)
            self.pending.append(made.ids)
            self.held += len(made.ids)

    @property
    def total(self) -> int:
        """Number of tokens added so far, in this run and earlier ones."""
        return self.index * self.size + self.held

    @property
    def done(self) -> bool:
        """True if the shard that ``last`` names has been written."""
        return self.last is not None and self.index > self.last

    def write_full(self) -> int:
        """Write every shard that is full and in range; returns their number. Raises: OSError."""
        if self.held < self.size or self.done:
            return 0
        tokens, starts = self._joined()
        before = self.index
        while len(tokens) >= self.size and not self.done:
            count = int(np.searchsorted(starts, self.size))
            if self.index >= self.first:
                self.shards.append(self._write(tokens[: self.size], starts[:count]))
            self.index += 1
            tokens, starts = tokens[self.size :], starts[count:] - self.size
        # Copies, because a view would keep the whole joined array alive.
        self.pending, self.starts, self.held = [tokens.copy()], [starts.copy()], len(tokens)
        return self.index - before

    def write_rest(self) -> ShardFacts | None:
        """Write the pending tokens as an incomplete shard, if there are any and it is in range. They stay pending, so that
        a later run can fill the shard."""
        if not self.held or self.done or self.index < self.first:
            return None
        return self._write(*self._joined())

    def _joined(self) -> tuple[Array, Array]:
        if len(self.pending) != 1:
            self.pending = [np.concatenate(self.pending or [np.empty(0, self.dtype)])]
            self.starts = [np.concatenate(self.starts or [np.empty(0, np.int64)])]
        return self.pending[0], self.starts[0]

    def _write(self, tokens: Array, starts: Array) -> ShardFacts:
        path = self.folder / shard_name(self.split, self.index)
        write_shard(path.with_suffix(".docs"), starts, np.uint32)
        write_shard(path, tokens, self.dtype, self.file_format)
        return ShardFacts(path.name, len(tokens), len(starts), sha256_of(path))

    # State for a later run.

    def state(self) -> tuple[dict[str, Any], bytes]:
        """Plain values, and the bytes of the pending tokens followed by the starts."""
        tokens, starts = self._joined()
        facts = {"index": self.index, "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        facts |= {"tokens": len(tokens), "starts": len(starts)}
        return facts, tokens.tobytes() + starts.tobytes()

    def restore(self, facts: dict[str, Any], content: bytes) -> int:
        """Continue from a ``state()``; ``content`` begins with its bytes, whose number is returned. Raises: DataError if
        one of its shards is missing."""
        self.index, self.shards = facts["index"], [ShardFacts(**shard) for shard in facts["shards"]]
        for name in names_gone(self.shards, self.dtype.itemsize, self.folder)[:1]:
            raise DataError(f"{self.folder / name} is missing; tokenize again with --overwrite")
        cut = facts["tokens"] * self.dtype.itemsize
        stop = cut + facts["starts"] * 8
        self.pending = [np.frombuffer(content[:cut], self.dtype)]
        self.starts = [np.frombuffer(content[cut:stop], np.int64)]
        self.held = facts["tokens"]
        return stop
