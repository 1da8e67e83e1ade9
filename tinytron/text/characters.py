"""A character tokenizer: one token for each character of a text, and none for other characters.

It is a tokenizer.json like any other: a ``WordLevel`` model of one-character words, without a token for unknown ones, so
that the ``tokenizers`` library rejects a text with other characters instead of dropping them. Tinytron encodes such texts
with a table, which takes a hundredth of the library's time and memory and gives the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytron.errors import DataError
from tinytron.utils.optional import require_package

ANY_CHARACTER = r"[\s\S]"


def train_characters(texts: Iterable[str], end: str | None) -> Any:
    """A ``tokenizers.Tokenizer`` of the characters of ``texts``, in the order of their code points, followed by ``end``.
    Raises: ConfigError without the package."""
    tokenizers = require_package("tokenizers")
    found: set[str] = set()
    for text in texts:
        found.update(text)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(sorted(found))}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(ANY_CHARACTER), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if end is not None:
        tokenizer.add_special_tokens([end])
    return tokenizer


def characters_of(file: Mapping[str, Any]) -> dict[str, int] | None:
    """The characters and their ids if the content of a tokenizer.json is a character tokenizer, else ``None``."""
    try:
        model, before = file["model"], file.get("pre_tokenizer") or {}
        vocabulary = model["vocab"]
        if model.get("type") != "WordLevel" or file.get("normalizer") is not None or model["unk_token"] in vocabulary:
            return None
        if before.get("pattern") != {"Regex": ANY_CHARACTER} or any(len(token) != 1 for token in vocabulary):
            return None
        return {str(token): int(number) for token, number in vocabulary.items()}
    except (KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class CharacterEncoder:
    """Encodes texts with a table of characters. ``name`` is the tokenizer's, for errors."""

    name: str
    vocabulary: Mapping[str, int]

    def __call__(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        """Shapes: one [characters] per text. Raises: DataError for a character that has no token."""
        return [self._encoded(text) for text in texts]

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The sorted code points and their ids; the last entry is above all characters, so that every search ends there."""
        known = sorted(self.vocabulary)
        codes = np.array([*map(ord, known), 0x110000], np.uint32)
        return codes, np.array([*(self.vocabulary[character] for character in known), -1], np.int64)

    def _encoded(self, text: str) -> npt.NDArray[np.int64]:
        codes, ids = self._table
        found = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        place = np.searchsorted(codes, found)
        missing = codes[place] != found
        if missing.any():
            character = chr(int(found[int(missing.argmax())]))
            raise DataError(
                f"{character!r} (U+{ord(character):04X}) is not one of the {len(self.vocabulary)} characters of the "
                f"tokenizer {self.name}, which has no token for it; leave it out, or use a tokenizer of --train_bpe"
            )
        return ids[place]
