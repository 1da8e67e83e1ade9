"""Datasets by name: where one is on the hub, and how its rows become documents.

@dataset("my-chats")
class MyChats(NamedDataset):
    \"\"\"Questions and answers.\"\"\"

    path = "me/my-chats"
    kind = "dialogues"

    @staticmethod
    def record(row):
        return turns(row["question"], row["answer"])
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tinytron.errors import ConfigError, DataError, TinytronError, first_line
from tinytron.registry import DATASETS
from tinytron.text.rows import Messages, RowKind, RowReader, TextRows, as_document, messages_of, pair_of


class NamedDataset:
    """A dataset of the hub, or local files, at ``path``, with its ``config`` and its ``split`` for training.

    A subclass of the ``kind`` ``text`` names its ``text_key``, or has ``record``, a static function that makes a text of a
    row. For other kinds ``record`` makes a list of messages (``dialogues``) or ``{"chosen", "rejected", "prompt"}``
    (``pairs``; the prompt is optional, and all three are texts or messages).
    """

    path: ClassVar[str] = ""
    config: ClassVar[str | None] = None
    split: ClassVar[str] = "train"
    kind: ClassVar[RowKind] = "text"
    text_key: ClassVar[str] = "text"
    record: ClassVar[Any] = None  # a function of a row, in its own types


def turns(user: str, assistant: str) -> Messages:
    """A dialogue of a question and its answer."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def find_named(name: str) -> type[NamedDataset] | None:
    """The dataset registered as ``name``, unless a local file or folder has that name. Raises: ConfigError if something
    other than a ``NamedDataset`` is registered."""
    if name not in DATASETS or Path(name).exists():
        return None
    found = DATASETS[name]
    if not (inspect.isclass(found) and issubclass(found, NamedDataset) and found.path):
        raise ConfigError(
            f"the dataset {name} is {found!r}; register a subclass of tinytron.text.named.NamedDataset with a path"
        )
    return found


def rows_of(name: str, found: type[NamedDataset]) -> RowReader:
    """The reader of the rows of the dataset ``name``."""
    return TextRows(found.text_key, f"text_key of {name}") if found.record is None else NamedRows(name, found)


@dataclass(frozen=True)
class NamedRows:
    """Reads rows with the ``record`` of the dataset registered as ``name``."""

    name: str
    dataset: type[NamedDataset]
    keys: ClassVar[None] = None

    @property
    def kind(self) -> RowKind:
        return self.dataset.kind

    def identity(self) -> dict[str, Any]:
        return {}

    def document(self, row: Any, where: str) -> str:
        assert self.dataset.record is not None, "rows_of makes no reader without it"
        try:
            value = self.dataset.record(row)
        except TinytronError:
            raise
        except Exception as error:  # the user's function failed, or the row has other columns
            raise DataError(
                f"{where}: the dataset {self.name} cannot read this row ({type(error).__name__}: {first_line(error)})"
            ) from error
        if self.kind == "dialogues":
            return as_document(value and messages_of(value, where))
        if self.kind == "pairs":
            return as_document(value and pair_of(value, where))
        if not isinstance(value, str | None):
            raise DataError(f"{where}: the dataset {self.name} gives {type(value).__name__}, not text")
        return value or ""
