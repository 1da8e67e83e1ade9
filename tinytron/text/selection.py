"""Selects which documents of a source are tokenized, in which order, and into which split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tinytron.text.parts import Part, Place
from tinytron.text.sources import CHUNK_BYTES, START, Chunk, TextSource

VAL = "val"


def is_held_out(text: bytes, fraction: float) -> bool:
    """True if a document goes to validation. This depends only on its text, so that copies of it get the same split."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class DocumentRule:
    """Splits documents: ``val`` for a fraction ``val_fraction`` of them, ``split`` for the others, none for documents that
    are empty or have fewer than ``min_chars`` characters."""

    split: str
    val_fraction: float = 0.0
    min_chars: int = 0

    def is_kept(self, text: str) -> bool:
        """True if the document is tokenized; surrounding white space does not count as characters."""
        return bool(text) and (not self.min_chars or len(text.strip()) >= self.min_chars)

    def split_of(self, text: str, held_out: bool) -> str | None:
        """The split, or ``None`` for a document that is left out; ``held_out`` documents always go to ``val``."""
        if not self.is_kept(text):
            return None
        if held_out or (self.val_fraction and is_held_out(text.encode(), self.val_fraction)):
            return VAL
        return self.split


def shuffled(texts: Iterable[str], buffer_size: int, seed: int) -> Iterator[str]:
    """The same texts in an order determined by ``seed``: whenever a text enters a full buffer of ``buffer_size``, a random
    one leaves it. A buffer of 0 or 1 keeps the order."""
    buffer: list[str] = []
    chance, buffer_size = random.Random(seed), max(1, buffer_size)
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        place = chance.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = text
    chance.shuffle(buffer)
    yield from buffer


@dataclass(frozen=True)
class SelectedSource:
    """The documents of ``source``, shuffled through a buffer of ``shuffle_buffer``, until ``rule`` has kept
    ``max_samples``.

    One process reads the documents. A later run reads those before its start again, but does not tokenize them again.
    """

    source: TextSource
    rule: DocumentRule
    max_samples: int | None
    shuffle_buffer: int
    seed: int

    def size(self) -> tuple[int | None, str]:
        """Unknown: the number of documents is only known at the end."""
        self.source.size()  # a source that cannot be loaded raises here
        return None, "document"

    def identity(self) -> dict[str, Any]:
        """The identity of ``source``; the selection is part of the options."""
        return self.source.identity()

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """See ``TextSource``."""
        texts: list[str] = []
        number = kept = size = 0
        for number, text in enumerate(shuffled(self._texts(), self.shuffle_buffer, self.seed), 1):
            kept += self.rule.is_kept(text)
            if number > start.at:
                texts.append(text)
                size += len(text)
            last = kept == self.max_samples
            if texts and (last or len(texts) >= chunksize or size >= CHUNK_BYTES):
                yield Chunk([Part(f"documents up to number {number}", data=texts)], Place(at=number), number)
                texts, size = [], 0
            if last:
                return
        if texts:
            yield Chunk([Part(f"documents up to number {number}", data=texts)], Place(at=number), number)

    def read(self, chunk: Chunk) -> Iterator[str]:
        """See ``TextSource``."""
        for part in chunk.parts:
            assert isinstance(part.data, list), "chunks contain the texts themselves"
            yield from part.data

    def _texts(self) -> Iterator[str]:
        # Small chunks, so that no more of a stream is fetched than is needed.
        for chunk in self.source.chunks(min(1024, self.max_samples or 1024)):
            yield from self.source.read(chunk)
