"""Writes documents' tokens into shards of equal size; tokens that are not in a shard yet are carried over to the next run.

Next to ``<split>_<index>.bin`` is ``<split>_<index>.docs``, a timl v1 file of uint32: the offsets in that shard at which
documents begin. ``.weights`` has the weights of a split that has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinytron.data.formats import FileFormat, write_shard, write_weights
from tinytron.data.manifest import ShardFacts
from tinytron.data.shards import names_gone
from tinytron.errors import DataError
from tinytron.utils.training import sha256_of

Array = npt.NDArray[Any]


class Tokens(NamedTuple):
    """The ids of some documents, one after the other, and the number of ids of each. ``weights``: how much each token
    counts as a target, or ``None`` if all count alike. ``contents``: if each document is a row of fixed length, the number
    of its tokens before its padding. Shapes: [tokens], [documents], [tokens], [documents]."""

    ids: Array
    lengths: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.uint8] | None = None
    contents: npt.NDArray[np.uint32] | None = None

    @classmethod
    def joined(cls, batches: Sequence[Tokens], dtype: np.dtype[Any]) -> Tokens:
        """The tokens of all ``batches``."""
        if not batches:
            return cls(np.empty(0, dtype), np.empty(0, np.uint32))
        fields: list[Any] = [None if of[0] is None else np.concatenate(of) for of in zip(*batches, strict=True)]
        return cls(*fields)

    def first(self, documents: int) -> Tokens:
        """The tokens of the first ``documents``."""
        lengths = self.lengths[:documents]
        count = int(lengths.sum(dtype=np.int64))
        weights = None if self.weights is None else self.weights[:count]
        return Tokens(self.ids[:count], lengths, weights, None if self.contents is None else self.contents[:documents])


def shard_name(split: str, index: int) -> str:
    """``train_000000.bin``."""
    return f"{split}_{index:06d}.bin"


@dataclass
class SplitWriter:
    """The shards of one split, with ``size`` tokens each but the last. Shards before ``first`` are not written; those after
    ``last`` are left for a later run.

    ``pending`` are tokens that are in no shard yet, ``starts`` the offsets of documents that begin among them, counted from
    the first pending token, and ``weights`` their weights if the split is ``weighted``. With ``row``, documents are rows of
    that many tokens, ``size`` is a multiple of it, and the padding of a row is in ``starts``, too.
    """

    folder: Path
    split: str
    dtype: np.dtype[Any]
    file_format: FileFormat
    size: int
    first: int = 0
    last: int | None = None
    weighted: bool = False
    row: int | None = None
    index: int = 0  # number of the next shard
    shards: list[ShardFacts] = field(default_factory=list)
    pending: list[Array] = field(default_factory=list)
    starts: list[Array] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)
    held: int = 0  # number of tokens in pending

    def add(self, made: Tokens) -> None:
        """Append the tokens of some documents; those without tokens are left out."""
        lengths = made.lengths[made.lengths > 0]
        if len(lengths):
            ends = np.cumsum(lengths, dtype=np.int64)
            starts = np.concatenate(([0], ends[:-1]))
            if made.contents is not None:
                padded = made.contents < lengths
                starts = np.unique(np.concatenate([starts, (starts + made.contents)[padded]]))
            self.starts.append(starts + self.held)
            self.pending.append(made.ids)
            if self.weighted:
                assert made.weights is not None, "the encoder of a weighted split gives weights"
                self.weights.append(made.weights)
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
        tokens, starts, weights = self._joined()
        before = self.index
        while len(tokens) >= self.size and not self.done:
            count = int(np.searchsorted(starts, self.size))
            if self.index >= self.first:
                self.shards.append(self._write(tokens[: self.size], starts[:count], weights[: self.size]))
            self.index += 1
            tokens, starts, weights = tokens[self.size :], starts[count:] - self.size, weights[self.size :]
        # Copies, because a view would keep the whole joined array alive.
        self.pending, self.starts, self.weights = [tokens.copy()], [starts.copy()], [weights.copy()]
        self.held = len(tokens)
        return self.index - before

    def write_rest(self) -> ShardFacts | None:
        """Write the pending tokens as an incomplete shard, if there are any and it is in range. They stay pending, so that
        a later run can fill the shard."""
        if not self.held or self.done or self.index < self.first:
            return None
        return self._write(*self._joined())

    def _joined(self) -> tuple[Array, Array, Array]:
        if len(self.pending) != 1:
            self.pending = [np.concatenate(self.pending or [np.empty(0, self.dtype)])]
            self.starts = [np.concatenate(self.starts or [np.empty(0, np.int64)])]
        if len(self.weights) != 1:
            self.weights = [np.concatenate(self.weights or [np.empty(0, np.uint8)])]
        return self.pending[0], self.starts[0], self.weights[0]

    def _write(self, tokens: Array, starts: Array, weights: Array) -> ShardFacts:
        path = self.folder / shard_name(self.split, self.index)
        write_shard(path.with_suffix(".docs"), starts, np.uint32)
        if self.weighted:
            write_weights(path.with_suffix(".weights"), weights)
        write_shard(path, tokens, self.dtype, self.file_format)
        documents = len(starts) if self.row is None else len(tokens) // self.row
        return ShardFacts(path.name, len(tokens), documents, sha256_of(path))

    # State for a later run.

    def state(self) -> tuple[dict[str, Any], bytes]:
        """Plain values, and the bytes of the pending tokens, the starts and the weights."""
        tokens, starts, weights = self._joined()
        facts = {"index": self.index, "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        facts |= {"tokens": len(tokens), "starts": len(starts)}
        return facts, tokens.tobytes() + starts.tobytes() + weights.tobytes()

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
        weights = content[stop : stop + self.held] if self.weighted else b""  # a byte each
        self.weights = [np.frombuffer(weights, np.uint8)]
        return stop + len(weights)
