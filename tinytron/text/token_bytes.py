"""The number of bytes of text that each token id stands for. It turns a loss per token into one per byte, which compares
models with different tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tinytron.errors import DataError
from tinytron.text.characters import characters_of
from tinytron.text.run_tokenizer import tokenizers_of_data

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_NAMES = [f"<0x{number:02X}>" for number in range(256)]
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
# What byte-level tokenizers write for a byte (GPT-2): its Latin-1 character, or one from U+0100 on if that is invisible.
_BYTE_CHARACTERS = {chr(code) for code in _PRINTABLE} | {chr(0x100 + n) for n in range(256 - len(_PRINTABLE))}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(serialized: bytes) -> list[int] | None:
    """The bytes of every id of a tokenizer.json, special tokens 0; ``None`` for a tokenizer whose tokens do not say which
    bytes they are: of words (WordPiece), of text that it changes first (lower case, say), or with characters that it has no
    token for. Read without the ``tokenizers`` package.

    A space that a tokenizer puts before a text is counted, though the text has none; after NFC its bytes are counted.
    Raises: ValueError if the content is not a tokenizer.
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
    if _changes_text(file.get("normalizer")):
        return None
    covered = set(names.values())
    if "ByteLevel" in kinds:
        if not covered >= _BYTE_CHARACTERS:
            return None
        sizes = {number: len(token) for number, token in names.items()}  # a character for every byte
    elif characters_of(file) is not None:
        sizes = {number: len(token.encode()) for number, token in names.items()}
    elif spaces:
        falls = "ByteFallback" in kinds
        if not falls or not {_SPACE, *_BYTE_NAMES} <= covered:
            return None  # what has no token becomes the one for unknown text, and a space three bytes
        sizes = {
            n: 1 if falls and _BYTE.fullmatch(t) else len(t.replace(_SPACE, " ").encode()) for n, t in names.items()
        }
    else:
        return None
    for added in file.get("added_tokens") or []:
        sizes[int(added["id"])] = 0 if added.get("special") else len(str(added["content"]).encode())
    return [sizes.get(number, 0) for number in range(1 + max(sizes, default=-1))]


def _changes_text(normalizer: Any) -> bool:
    """Whether a normalizer changes more than how spaces are written, or than NFC, which most text is in."""
    if normalizer is None:
        return False
    kind = normalizer.get("type")
    if kind == "Sequence":
        return any(map(_changes_text, normalizer["normalizers"]))
    spaces = kind == "Replace" and normalizer.get("pattern") == {"String": " "} and normalizer.get("content") == _SPACE
    return not (spaces or kind == "NFC" or (kind == "Prepend" and normalizer.get("prepend") == _SPACE))


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
