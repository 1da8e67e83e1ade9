"""Encodes a chunk of documents to token ids: the work of one process of the pool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinytron.text.encoders import DocumentEncoder
from tinytron.text.selection import VAL, DocumentRule
from tinytron.text.sources import Chunk, TextSource
from tinytron.text.token_writer import Tokens
from tinytron.utils.optional import as_data_error
from tinytron.utils.texts import whole_characters

BATCH_CHARS = 2**20  # tokenized at a time
_LEFT_OUT = -1


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk by split, for each side of the documents (``encoders.py``). ``order`` has an entry for each
    document of the chunk: the number of its split in ``splits``, or -1 if it was left out."""

    splits: dict[str, tuple[Tokens, ...]]
    order: npt.NDArray[np.int8]

    @property
    def empty(self) -> int:
        """Number of documents left out."""
        return int(np.count_nonzero(self.order == _LEFT_OUT))

    @property
    def documents(self) -> int:
        """Number of documents that were encoded."""
        return len(self.order) - self.empty

    @property
    def tokens(self) -> int:
        """Number of tokens in all splits."""
        return sum(len(tokens.ids) for sides in self.splits.values() for tokens in sides)

    def until(self, room: int) -> Encoded:
        """The first documents, up to the one with which they have ``room`` tokens; all if they have fewer."""
        if self.tokens < room:
            return self
        lengths = np.zeros(len(self.order), np.int64)
        for number, sides in enumerate(self.splits.values()):
            lengths[self.order == number] = sum(tokens.lengths.astype(np.int64) for tokens in sides)
        order = self.order[: int(np.searchsorted(lengths.cumsum(), room)) + 1]
        counts = [int(np.count_nonzero(order == number)) for number in range(len(self.splits))]
        found = zip(self.splits.items(), counts, strict=True)
        return Encoded({split: tuple(t.first(count) for t in sides) for (split, sides), count in found}, order)


@dataclass(frozen=True)
class ChunkEncoder:
    """Reads a chunk, assigns each document to a split by ``rule``, and encodes the documents."""

    source: TextSource
    encoder: DocumentEncoder
    rule: DocumentRule

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises: DataError naming file and line or row."""
        splits = list(dict.fromkeys((self.rule.split, VAL)))
        waiting: dict[str, list[str]] = {split: [] for split in splits}
        made: dict[str, list[tuple[Tokens, ...]]] = {split: [] for split in splits}
        order: list[int] = []
        chars = 0

        def flush() -> None:
            for split, texts in waiting.items():
                if texts:
                    with as_data_error(f"{chunk.parts[0].path}: the tokenizer failed"):
                        made[split].append(self.encoder(texts))
                    texts.clear()

        for text in self.source.read(chunk):
            text = whole_characters(text)
            split = self.rule.split_of(text, chunk.held_out)
            order.append(_LEFT_OUT if split is None else splits.index(split))
            if split is None:
                continue
            waiting[split].append(text)
            chars += len(text)
            if chars >= BATCH_CHARS:
                flush()
                chars = 0
        flush()
        joined = {split: self._joined(batches) for split, batches in made.items()}
        return Encoded(joined, np.array(order, np.int8))

    def _joined(self, batches: list[tuple[Tokens, ...]]) -> tuple[Tokens, ...]:
        sides = range(self.encoder.sides)
        return tuple(Tokens.joined([batch[side] for batch in batches], self.encoder.dtype) for side in sides)
