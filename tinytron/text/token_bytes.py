"""The number of bytes of text that each token id stands for. It turns a loss per token into one per byte, which compares
models with different tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tinytron.errors import DataError
from tinytron.text.run_tokenizer import tokenizers_of_data

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(serialized: bytes) -> list[int] | None:
    """The bytes of every id of a tokenizer.json, special tokens 0; ``None`` for a tokenizer whose tokens do not say which
    bytes they are (WordPiece, say). Read without the ``tokenizers`` package.

    A space that SentencePiece puts before a text is counted, though the text has none. Raises: ValueError if the content
    is not a tokenizer.
    """
    file = json.loads(serialized)
    try:
        vocabulary = file["model"]["vocab"]
        parts = list(_decoders(file.get("decoder")))
    except (KeyError, TypeError, AttributeError):
        raise ValueError("it has no model with a vocabulary, or a decoder of another form") from None
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], n) for n, row in enumerate(vocabulary))
    names = {int(number): str(token) for token, number in pairs}
    kinds = {part.get("type") for part in parts}
    spaces = "Metaspace" in kinds or any(p.get("type") == "Replace" and p.get("content") == " " for p in parts)
    if "ByteLevel" in kinds:
        sizes = {number: len(token) for number, token in names.items()}  # a character for every byte
    elif spaces:
        falls = "ByteFallback" in kinds
        sizes = {
            n: 1 if falls and _BYTE.fullmatch(t) else len(t.replace(_SPACE, " ").encode()) for n, t in names.items()
        }
    else:
        return None
    for added in file.get("added_tokens") or []:
        sizes[int(added["id"])] = 0 if added.get("special") else len(str(added["content"]).encode())
    return [sizes.get(number, 0) for number in range(1 + max(sizes, default=-1))]


def _decoders(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for inner in decoder["decoders"]:
            yield from _decoders(inner)
    else:
        yield decoder


def token_bytes_of_data(dataset_path: str | None) -> list[int] | None:
    """``token_bytes`` of the one tokenizer.json next to all shards of ``--dataset_path``; ``None`` if there is none, or not
    the same one everywhere. Raises: DataError for a damaged one."""
    found = tokenizers_of_data(dataset_path)
    files = found.files
    contents = {file.read_bytes() for file in files}
    if len(contents) != 1 or len(files) < len(found.folders):
        return None
    try:
        return token_bytes(contents.pop())
    except ValueError as error:
        raise DataError(
            f"{files[0]} is no tokenizer ({error}); tokenize again with --overwrite, or remove it"
        ) from error
