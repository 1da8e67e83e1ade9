"""A chunk of documents to token ids: what a worker process of the tokeniser does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytron.data.documents import BATCH_CHARS, as_data_error, whole_characters
from tinytron.text.sources import Chunk, Source
from tinytron.text.tokenizers import Encode, encode_documents

VAL = "val"


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is for validation: a matter of its text alone, so that copies of it go the same way."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class Encoded:
    """A chunk's tokens and document lengths by split, and its number of empty documents."""

    splits: dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]]
    empty: int


@dataclass(frozen=True)
class ChunkEncoder:
    """What a worker does with a chunk. ``val_fraction`` of the documents go to the split ``val``, the others to
    ``split``; those without text nowhere."""

    source: Source
    encode: Encode
    eot_id: int
    eot_position: str
    dtype: np.dtype[Any]
    split: str
    val_fraction: float

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises: DataError naming file and line or row."""
        waiting: dict[str, list[str]] = {self.split: [], VAL: []}
        made: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]]] = {self.split: [], VAL: []}
        chars = empty = 0

        def flush() -> None:
            for split, texts in waiting.items():
                if texts:
                    with as_data_error(f"{chunk.parts[0].path}: the tokenizer failed"):
                        made[split].append(self._encoded(texts))
                    texts.clear()

        for text in self.source.read(chunk):
            if not text:
                empty += 1
                continue
            text = whole_characters(text)
            held_out = self.val_fraction and is_held_out(text.encode(), self.val_fraction)
            waiting[VAL if held_out else self.split].append(text)
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
