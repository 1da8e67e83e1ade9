"""Which documents of a source are tokenized, in which order, and into which split."""

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
    """Whether a document is for validation. This depends on its text alone, so that copies of it go the same way."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class DocumentRule:
    """The split of a document: ``val`` for ``val_fraction`` of them, ``split`` for the others, none for those without text
    or with less than ``min_chars`` characters."""

    split: str
    val_fraction: float = 0.0
    min_chars: int = 0

    def is_kept(self, text: str) -> bool:
        """Whether the document is tokenized; white space around it is not counted as characters."""
        return bool(text) and (not self.min_chars or len(text.strip()) >= self.min_chars)

    def split_of(self, text: str, held_out: bool) -> str | None:
        """The split, or ``None`` for a document that is left out; ``held_out`` ones go to ``val`` anyway."""
        if not self.is_kept(text):
            return None
        if held_out or (self.val_fraction and is_held_out(text.encode(), self.val_fraction)):
            return VAL
        return self.split


def shuffled(texts: Iterable[str], buffer_size: int, seed: int) -> Iterator[str]:
    """The same texts in an order that ``seed`` decides: each leaves a buffer of ``buffer_size`` at random when another
    comes in. A buffer of 0 or 1 keeps the order."""
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
    """The documents of ``source``, shuffled through a buffer of ``shuffle_buffer``, up to the one with which ``rule`` has
    kept ``max_samples``.

    One process reads the documents. A later run reads again what came before its start, but does not tokenize it again.
    """

    source: TextSource
    rule: DocumentRule
    max_samples: int | None
    shuffle_buffer: int
    seed: int

    def size(self) -> tuple[int | None, str]:
        """Unknown: how many documents there are shows only at their end."""
        self.source.size()  # a source that cannot be loaded raises here
        return None, "document"

    def identity(self) -> dict[str, Any]:
        """That of ``source``; the selection is part of the options."""
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
            assert isinstance(part.data, list), "chunks holds the texts"
            yield from part.data

    def _texts(self) -> Iterator[str]:
        # Small chunks: of a stream, no more is fetched than is needed.
        for chunk in self.source.chunks(min(1024, self.max_samples or 1024)):
            yield from self.source.read(chunk)
