"""Rows of a file or a hub dataset as documents. A document is a string: the text itself, or the JSON of a record.

a row with           document                                                  read by
a text               the text                                                  ``TextRows``
messages             ``[{"role": "user", "content": "..."}, ...]``             ``MessageRows``
chosen, rejected     ``{"chosen": D, "rejected": D}``, D a text or messages    ``PairRows``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from tinytron.errors import DataError

RowKind = Literal["text", "dialogues", "pairs"]
Messages = list[dict[str, str]]


class RowReader(Protocol):
    """Makes documents of rows. Picklable, so that worker processes can read. ``keys`` are those that it reads of a row
    (``None``: all), ``kind`` is what its documents are."""

    @property
    def keys(self) -> tuple[str, ...] | None: ...
    @property
    def kind(self) -> RowKind: ...
    def identity(self) -> dict[str, Any]:
        """Plain JSON values for the record of a source."""

    def document(self, row: Any, where: str) -> str:
        """The document of a row; empty if the row has none. Raises: DataError that begins with ``where``."""


@dataclass(frozen=True)
class TextRows:
    """The text under ``text_key``, which ``option`` sets; null becomes an empty text."""

    text_key: str = "text"
    option: str = "the text key"
    kind: ClassVar[RowKind] = "text"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.text_key,)

    def identity(self) -> dict[str, Any]:
        return {"text_key": self.text_key}

    def document(self, row: Any, where: str) -> str:
        text = value_of(row, self.text_key, where, self.option)
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise DataError(f"{where}: {self.text_key!r} is {kind}, not text; set {self.option} to another key")
        return text or ""


@dataclass(frozen=True)
class MessageRows:
    """The dialogue under ``messages_key``."""

    messages_key: str
    kind: ClassVar[RowKind] = "dialogues"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.messages_key,)

    def identity(self) -> dict[str, Any]:
        return {"messages_key": self.messages_key}

    def document(self, row: Any, where: str) -> str:
        value = value_of(row, self.messages_key, where, "--messages_key")
        return as_document(value and messages_of(value, f"{where}: {self.messages_key!r}"))


@dataclass(frozen=True)
class PairRows:
    """The better answer under ``chosen_key`` and the worse one under ``rejected_key``: texts or dialogues. The optional
    ``prompt_key`` has what comes before both."""

    chosen_key: str
    rejected_key: str
    prompt_key: str | None = None
    kind: ClassVar[RowKind] = "pairs"

    @property
    def keys(self) -> tuple[str, ...]:
        prompt = () if self.prompt_key is None else (self.prompt_key,)
        return (self.chosen_key, self.rejected_key, *prompt)

    def identity(self) -> dict[str, Any]:
        return {"chosen_key": self.chosen_key, "rejected_key": self.rejected_key, "prompt_key": self.prompt_key}

    def document(self, row: Any, where: str) -> str:
        pair = {
            "chosen": value_of(row, self.chosen_key, where, "--chosen_key"),
            "rejected": value_of(row, self.rejected_key, where, "--rejected_key"),
        }
        if self.prompt_key is not None:
            pair["prompt"] = value_of(row, self.prompt_key, where, "--prompt_key")
        return as_document(pair_of(pair, where))


def value_of(row: Any, key: str, where: str, option: str) -> Any:
    """``row[key]``. Raises: DataError starting with ``where`` and naming ``option``, which sets the key, if it is
    missing."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is {type(row).__name__}, not an object with keys; give one object per line")
    if key not in row:
        keys = ", ".join(map(str, row)) or "no keys at all"
        raise DataError(f"{where} has no key {key!r}; set {option} to one that it has: {keys}")
    return row[key]


def as_document(record: Any) -> str:
    """The JSON of a record; empty for an empty one."""
    return json.dumps(record, ensure_ascii=False) if record else ""


def messages_of(value: Any, where: str) -> Messages:
    """The messages of a dialogue, with roles and contents only. Raises: DataError starting with ``where``."""
    works = 'use [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'
    if not isinstance(value, list):
        raise DataError(f"{where} is {type(value).__name__}, not a list of messages; {works}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {number} is {type(message).__name__}, not an object; {works}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or (key == "role" and not message[key]):
                raise DataError(f"{where}: message {number} has {key} {message.get(key)!r}, not a text; {works}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def pair_of(value: Any, where: str) -> dict[str, Any]:
    """A pair of texts or dialogues, ``{"chosen": ..., "rejected": ...}``, both with the optional prompt in front. Raises:
    DataError starting with ``where``, for a missing or empty counterpart, too."""
    if not isinstance(value, Mapping):
        raise DataError(f'{where} is {type(value).__name__}, not a pair; use {{"chosen": ..., "rejected": ...}}')
    for side in ("chosen", "rejected"):
        if not value.get(side):
            raise DataError(
                f"{where}: the {side} answer of the pair is missing or empty; give both answers, or remove it"
            )
    prompt = value.get("prompt")
    return {side: _answer(prompt, value[side], f"{where}: the {side} answer") for side in ("chosen", "rejected")}


def _answer(prompt: Any, answer: Any, where: str) -> str | Messages:
    """``answer`` after ``prompt``, unless it begins with the prompt itself. Two texts become a question and its answer."""
    if not prompt and isinstance(answer, str):
        return answer
    before: Messages = []
    if prompt:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        before = messages_of(asked, f"{where}: its prompt")
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    messages = messages_of(said, where)
    return messages if messages[: len(before)] == before else [*before, *messages]
