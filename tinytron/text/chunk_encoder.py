"""Encodes a chunk of documents to token ids: the work of one process of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytron.text.selection import VAL, DocumentRule
from tinytron.text.sources import Chunk, TextSource
from tinytron.text.tokenizers import Encode, encode_documents
from tinytron.utils.optional import as_data_error
from tinytron.utils.texts import whole_characters

BATCH_CHARS = 2**20  # tokenized at a time


@dataclass(frozen=True)
class Encoded:
    """A chunk's tokens and document lengths by split, and the number of documents left out."""

    splits: dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]]
    empty: int


@dataclass(frozen=True)
class ChunkEncoder:
    """Reads a chunk, assigns each document to a split by ``rule``, and encodes the documents."""

    source: TextSource
    encode: Encode
    eot_id: int | None
    eot_position: str
    dtype: np.dtype[Any]
    rule: DocumentRule

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises: DataError naming file and line or row."""
        waiting: dict[str, list[str]] = {self.rule.split: [], VAL: []}
        made: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]]] = {self.rule.split: [], VAL: []}
        chars = empty = 0

        def flush() -> None:
            for split, texts in waiting.items():
                if texts:
                    with as_data_error(f"{chunk.parts[0].path}: the tokenizer failed"):
                        made[split].append(self._encoded(texts))
                    texts.clear()

        for text in self.source.read(chunk):
            text = whole_characters(text)
            split = self.rule.split_of(text, chunk.held_out)
            if split is None:
                empty += 1
                continue
            waiting[split].append(text)
            chars += len(text)
            if chars >= BATCH_CHARS:
                flush()
                chars = 0
        flush()
        joined = {
            split: (np.concatenate([tokens for tokens, _ in batches]), np.concatenate([n for _, n in batches]))
            for split, batches in made.items()
            if batches
        }
        return Encoded(joined, empty)

    def _encoded(self, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]:
        return encode_documents(texts, self.encode, self.eot_id, self.eot_position, self.dtype)
