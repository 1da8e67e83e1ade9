"""Number of bytes of text that each token id stands for, to turn a loss per token into a loss per byte, which is comparable
between models with different tokenizers."""

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
# How byte-level tokenizers (GPT-2) write a byte: its Latin-1 character, or one from U+0100 on if that is invisible.
_BYTE_CHARACTERS = {chr(code) for code in _PRINTABLE} | {chr(0x100 + n) for n in range(256 - len(_PRINTABLE))}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(serialized: bytes) -> list[int] | None:
    """The number of bytes of every id of a tokenizer.json, 0 for special tokens. ``None`` for a tokenizer whose tokens do
    not tell: one of words (WordPiece), one that changes the text first (to lower case, say), or one that lacks tokens for
    some characters. Read without the ``tokenizers`` package.

    A space that a tokenizer puts before a text is counted, though the text does not have it; for NFC, the bytes after
    normalization count. Raises: ValueError if the content is not a tokenizer.
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
        sizes = {number: len(token) for number, token in names.items()}  # one character for every byte
    elif characters_of(file) is not None:
        sizes = {number: len(token.encode()) for number, token in names.items()}
    elif spaces:
        falls = "ByteFallback" in kinds
        if not falls or not {_SPACE, *_BYTE_NAMES} <= covered:
            return None  # text without a token becomes the unknown token, and a space three bytes
        sizes = {
            n: 1 if falls and _BYTE.fullmatch(t) else len(t.replace(_SPACE, " ").encode()) for n, t in names.items()
        }
    else:
        return None
    for added in file.get("added_tokens") or []:
        sizes[int(added["id"])] = 0 if added.get("special") else len(str(added["content"]).encode())
    return [sizes.get(number, 0) for number in range(1 + max(sizes, default=-1))]


def _changes_text(normalizer: Any) -> bool:
    """True if a normalizer changes more than the spelling of spaces and NFC, which most text already is."""
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
    """``token_bytes`` of the one tokenizer.json next to all shards of ``--dataset_path``; ``None`` if some shards have none
    or a different one. Raises: DataError if it is damaged."""
    found = tokenizers_of_data(dataset_path)
    files = found.files
    contents = {file.read_bytes() for file in files}
    if len(contents) != 1 or len(files) < len(found.folders):
        return None
    try:
        return token_bytes(contents.pop())
    except ValueError as error:
        raise DataError(
            f"{files[0]} is not a tokenizer ({error}); tokenize again with --overwrite, or remove it"
        ) from error
