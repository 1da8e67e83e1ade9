"""Pack files, which are stored next to their shards: ``train_000000.pack4096`` describes how the documents of
``train_000000.bin`` fill rows of 4096 tokens (packing.py). A pack file is a timl v1 file of uint32:

    version 1, tokens of the shard, hash of the shard, rows R, pieces P, hash of the rest: [R] end of each row among the
    pieces, [P] first token of each piece, [P] its number of training pairs
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytron.data.formats import open_shard, write_shard
from tinytron.data.packing import PackIndex, pack_index
from tinytron.data.shards import Shard
from tinytron.errors import DataError

VERSION = 1
HEADER = 6


class PackFile:
    """The packing of ``shard`` for rows of ``seq_len`` tokens, memory-mapped.

    Raises: DataError if the file does not exist (``make_pack_files`` writes it), is not a packing, or belongs to other
    tokens.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self.shard, self.seq_len = shard, seq_len
        self.path = path = shard.path.with_suffix(f".pack{seq_len}")
        values = np.asarray(open_shard(path))
        head = values[:HEADER].tolist()
        if len(head) < HEADER or head[0] != VERSION or len(values) != HEADER + head[3] + 2 * head[4]:
            raise DataError(f"{path} is not a packing of version {VERSION}; remove it, and the next run rebuilds it")
        if head[1] != shard.count or head[2] != _hash(shard):
            raise DataError(f"{path} is not a packing of the tokens in {shard.path.name}; remove it")
        if zlib.crc32(np.ascontiguousarray(values[HEADER:]).data) != head[5]:
            raise DataError(f"{path} is damaged; remove it, and the next run rebuilds it")
        self.num_rows, num_pieces = head[3], head[4]
        self.row_ends, self.firsts, self.counts = np.split(values[HEADER:], [self.num_rows, self.num_rows + num_pieces])

    def __getstate__(self) -> dict[str, Any]:
        return {"shard": self.shard, "seq_len": self.seq_len}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """The first token and the number of training pairs of each piece of a row. Raises: DataError if they are
        impossible."""
        low, high = int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row])
        pieces = list(zip(self.firsts[low:high].tolist(), self.counts[low:high].tolist(), strict=True))
        inside = all(0 < count < self.shard.count - first for first, count in pieces)
        if not inside or sum(count for _, count in pieces) > self.seq_len:
            raise DataError(f"{self.path} is damaged: row {row} does not fit {self.seq_len} tokens; remove it")
        return pieces


def make_pack_files(shards: Sequence[Shard], seq_len: int) -> None:
    """Write the packings of ``shards`` unless they exist and are valid. Raises: DataError if one cannot be written."""
    for shard in shards:
        try:
            PackFile(shard, seq_len)
        except DataError:  # missing, damaged, or for other tokens
            _make(shard, seq_len)


def _make(shard: Shard, seq_len: int) -> None:
    path = shard.path.with_suffix(f".pack{seq_len}")
    index = pack_index(shard.starts_between(0, shard.count), shard.count, seq_len)
    try:
        write_shard(path, _as_values(index, shard), np.uint32)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); --packing best_fit stores its packing next to the shards: make "
            "the folder writable, or use --packing concat"
        ) from error


def _as_values(index: PackIndex, shard: Shard) -> npt.NDArray[np.uint32]:
    rest = np.concatenate(index)
    sizes = len(index.row_ends), len(index.piece_starts)
    head = [VERSION, shard.count, _hash(shard), *sizes, zlib.crc32(rest.data)]
    return np.concatenate([np.array(head, np.uint32), rest])


def _hash(shard: Shard) -> int:
    """A hash of everything that the packing depends on: the document starts, and a digest of the tokens."""
    starts = shard.document_starts
    documents = repr(shard.eot).encode() if starts is None else starts.tobytes()
    return zlib.crc32(documents, zlib.crc32(shard.fingerprint(0)))
