"""Documents to token ids, with weights and as rows of fixed length where the options ask for them.

A *side* of a document is what becomes one sequence of tokens: texts and dialogues have one, pairs have two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tinytron.text.chat import ChatML, Segment, Template, with_system
from tinytron.text.rows import Messages, RowKind
from tinytron.text.token_writer import Tokens
from tinytron.text.tokenizers import Encode, check_no_end, encode_all, encode_documents

Array = npt.NDArray[Any]
SIDES: Mapping[RowKind, tuple[str, ...]] = {"text": ("",), "dialogues": ("",), "pairs": (".pos", ".neg")}


class DocumentEncoder(Protocol):
    """Encodes documents; picklable."""

    @property
    def sides(self) -> int:
        """Number of sides of every document."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a token."""

    def __call__(self, documents: list[str]) -> tuple[Tokens, ...]:
        """The tokens of the documents, for each side."""

    def identity(self) -> dict[str, Any]:
        """The options that determine the result, in plain JSON values, unless they are recorded elsewhere."""


@dataclass(frozen=True)
class PlainEncoder:
    """Texts, with ``eot_id`` before or after each (``eot_position``) unless it is ``None``."""

    encode: Encode
    eot_id: int | None
    eot_position: str
    dtype: np.dtype[Any]
    sides: ClassVar[int] = 1

    def __call__(self, documents: list[str]) -> tuple[Tokens, ...]:
        """See ``DocumentEncoder``."""
        return (Tokens(*encode_documents(documents, self.encode, self.eot_id, self.eot_position, self.dtype)),)

    def identity(self) -> dict[str, Any]:
        """See ``DocumentEncoder``."""
        return {}


class RowShape(NamedTuple):
    """Rows of ``size`` tokens, filled up with ``pad_id``."""

    size: int
    pad_id: int


class Piece(NamedTuple):
    """A special token (``number``) or a plain text, and whether it is part of an answer of the assistant."""

    text: str
    number: int | None
    learned: bool


@dataclass(frozen=True)
class RecordEncoder:
    """Documents of any ``kind``. With ``assistant_only`` a dialogue's tokens have the weight 1 in answers of the assistant
    and 0 elsewhere; all other tokens have 1. With ``row`` every side becomes one row: the last tokens of a longer one, a
    shorter one filled up at its end with tokens of the weight 0."""

    encode: Encode
    eot_id: int | None
    eot_position: str
    dtype: np.dtype[Any]
    kind: RowKind
    specials: Mapping[str, int]
    template: Template
    system_prompt: str | None = None
    assistant_only: bool = False
    row: RowShape | None = None

    @property
    def sides(self) -> int:
        """See ``DocumentEncoder``."""
        return len(SIDES[self.kind])

    def identity(self) -> dict[str, Any]:
        """See ``DocumentEncoder``. ``block_size`` and ``pairs`` tell readers how shards are divided into samples."""
        found: dict[str, Any] = {}
        if self.kind != "text":
            found |= self.template.identity() | {"assistant_only": self.assistant_only}
            found |= {"system_prompt": self.system_prompt}
        if self.row is not None:
            found |= {"block_size": self.row.size, "pad_id": self.row.pad_id}
        return found | ({"pairs": True} if self.kind == "pairs" else {})

    def __call__(self, documents: list[str]) -> tuple[Tokens, ...]:
        """See ``DocumentEncoder``."""
        found = [sides_of(self.kind, document) for document in documents]
        sides = list(zip(*found, strict=True)) or [()] * self.sides
        return tuple(self._tokens(side) for side in sides)

    def _tokens(self, side: Sequence[str | Messages]) -> Tokens:
        pieces = [self._pieces_of(one) for one in side]
        texts = [piece.text for mine in pieces for piece in mine if piece.number is None]
        made = encode_all(texts, self.encode, self.dtype) if texts else []
        check_no_end(made, self.eot_id)
        encoded = iter(made)
        ids, weights, lengths, contents = [], [], [], []
        for mine in pieces:
            parts = [next(encoded) if piece.number is None else np.array([piece.number], self.dtype) for piece in mine]
            learned = [np.full(len(part), piece.learned, np.uint8) for part, piece in zip(parts, mine, strict=True)]
            tokens, weight = _joined(parts, self.dtype), _joined(learned, np.dtype(np.uint8))
            if self.row is not None:
                tokens, weight = tokens[-self.row.size :], weight[-self.row.size :]
                contents.append(len(tokens))
                missing = self.row.size - len(tokens)
                tokens = np.concatenate([tokens, np.full(missing, self.row.pad_id, self.dtype)])
                weight = np.concatenate([weight, np.zeros(missing, np.uint8)])
            ids.append(tokens)
            weights.append(weight)
            lengths.append(len(tokens))
        weighted = self.row is not None or self.assistant_only
        return Tokens(
            _joined(ids, self.dtype),
            np.array(lengths, np.uint32),
            _joined(weights, np.dtype(np.uint8)) if weighted else None,
            np.array(contents, np.uint32) if self.row is not None else None,
        )

    def _pieces_of(self, value: str | Messages) -> list[Piece]:
        """The pieces of one side, with the token that separates documents."""
        if isinstance(value, str):
            segments = [Segment(value, False, True)]
        else:
            segments = self.template(with_system(value, self.system_prompt))
        found = pieces_of(segments, self.specials, self._marks)
        if self.eot_id is not None:
            end = Piece("", self.eot_id, isinstance(value, str))
            found = [end, *found] if self.eot_position == "prepend" else [*found, end]
        return found if self.assistant_only else [piece._replace(learned=True) for piece in found]

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return marks_of(self.specials)


def pieces_of(
    segments: Iterable[Segment], specials: Mapping[str, int], marks: re.Pattern[str] | None = None
) -> list[Piece]:
    """The pieces of a rendered dialogue. Neighboring plain texts are one piece, unless only one of them is learned.
    ``marks`` is ``marks_of(specials)``."""
    marks = marks_of(specials) if marks is None else marks
    found: list[Piece] = []
    for segment in segments:
        for text in marks.split(segment.text) if segment.marks and specials else [segment.text]:
            number = specials.get(text) if segment.marks else None
            last = found[-1] if found else None
            if number is None and last is not None and last.number is None and last.learned == segment.learned:
                found[-1] = last._replace(text=last.text + text)
            elif text:
                found.append(Piece(text, number, segment.learned))
    return found


def marks_of(specials: Mapping[str, int]) -> re.Pattern[str]:
    """A pattern that finds the special tokens in a text."""
    longest_first = sorted(specials, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _joined(arrays: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def sides_of(kind: RowKind, document: str) -> list[str | Messages]:
    """The texts or dialogues in a document."""
    if kind == "text":
        return [document]
    record = json.loads(document)
    return [record["chosen"], record["rejected"]] if kind == "pairs" else [record]


def text_of(kind: RowKind, document: str, system_prompt: str | None) -> str:
    """A document as plain text, for training a tokenizer: dialogues in ChatML."""
    parts = []
    for side in sides_of(kind, document):
        dialogue = [] if isinstance(side, str) else ChatML()(with_system(side, system_prompt))
        parts.append(side if isinstance(side, str) else "".join(segment.text for segment in dialogue))
    return "".join(parts)
