"""Items of an evaluation from a dataset by name: its rows on the hub, or a local file with the same columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tinytron.errors import ConfigError, DataError, TinytronError, first_line
from tinytron.evaluation.kinds import PPL, Evaluation, PerplexityEvaluation
from tinytron.text.named import NamedDataset
from tinytron.text.rows import Messages, RowKind
from tinytron.text.sources import open_source

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_ROWS_AT_ONCE = 256


class HubItems(Evaluation):
    """An evaluation whose items are those of a ``dataset``'s ``split``, as ``item_of`` makes them of rows. At most ``most``
    rows are used (``None``: all). With a ``data_dir``, the rows are those of a file there, called as the evaluation without
    ``_ppl``: ``mnli.jsonl``, ``mnli.jsonl.gz`` or ``mnli.parquet``. With several ``configs``, the hub's rows are taken from
    each in turn, so that the first items are of all of them.

    Put it before one of the four kinds: ``class Mine(HubItems, RolloutEvaluation)``.
    """

    dataset: ClassVar[type[NamedDataset]]
    split: ClassVar[str] = "validation"
    most: ClassVar[int | None] = None
    configs: ClassVar[tuple[str, ...]] = ()  # empty: that of the dataset
    _or_else: ClassVar[str] = ", or leave --eval_data_dir (eval.data_dir) out to use the hub"

    @property
    def columns(self) -> str:
        """The columns that a row needs, in words for errors."""
        return f"the columns of {self.dataset.path}, split {self.split}"

    def item_of(self, row: Mapping[str, Any]) -> Any:
        """The result of ``get`` for a row; ``None`` leaves the row out."""
        raise TypeError(f"{type(self).__name__} has no method item_of")

    @cached_property
    def items(self) -> list[Any]:
        """The items, up to ``length``. Raises: DataError or ConfigError for rows that cannot be read."""
        limits = [limit for limit in (self.most, self.length) if limit is not None and limit >= 0]
        found: list[Any] = []
        for number, row in enumerate(self._read(), 1):
            if limits and len(found) >= min(limits):
                break
            try:
                item = self.item_of(row)
            except Exception as error:  # other columns, or a split without answers
                raise DataError(
                    f"the evaluation {self.name}: row {number} cannot be read ({type(error).__name__}: "
                    f"{first_line(error)}); it needs {self.columns}"
                ) from error
            if item is not None:
                found.append(item)
        return found

    def __len__(self) -> int:
        return len(self.items)

    def get(self, index: int) -> Any:
        """Item ``index``."""
        return self.items[index]

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.data_dir is not None:
            yield from self._stream(str(self._file(self.data_dir)), None)
            return
        try:
            parts = [self._stream(self.dataset.path, config) for config in self.configs or (self.dataset.config,)]
            while parts:
                for part in tuple(parts):
                    row = next(part, None)
                    if row is None:
                        parts.remove(part)
                    else:
                        yield row
        except TinytronError as error:
            raise DataError(
                f"the evaluation {self.name} needs the dataset {self.dataset.path} of the hub, which cannot be read "
                f"({error}); without a network, put its rows into DIR/{self._stem}.jsonl and give --eval_data_dir DIR "
                "(eval.data_dir)"
            ) from error

    def _stream(self, path: str, config: str | None) -> Iterator[dict[str, Any]]:
        options = {"config": config, "split": self.split, "rows": _WholeRows(), "streaming": True}
        source = open_source(path, **options, cache_dir=None)  # type: ignore[arg-type]
        for chunk in source.chunks(_ROWS_AT_ONCE):
            yield from map(json.loads, source.read(chunk))

    @property
    def _stem(self) -> str:
        return self.name.removesuffix(PPL)

    def _file(self, folder: Path) -> Path:
        names = [f"{self._stem}{suffix}" for suffix in SUFFIXES]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise ConfigError(
                f"the evaluation {self.name} needs {folder / names[0]} (or {', '.join(names[1:])}), with {self.columns}; "
                f"put it there{self._or_else}"
            )
        return found


class FileItems(HubItems):
    """An evaluation whose rows are always those of a local file, because ``datasets`` cannot read them from the hub.
    ``needs`` names the columns, and who publishes them."""

    needs: ClassVar[str]
    _or_else = ""

    @property
    def columns(self) -> str:
        """The columns that a row needs, in words for errors."""
        return self.needs

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.data_dir is None:
            raise ConfigError(
                f"the evaluation {self.name} reads a local file: put rows with {self.needs} into "
                f"DIR/{self._stem}.jsonl, and give --eval_data_dir DIR (eval.data_dir)"
            )
        yield from super()._read()


class TextPerplexity(HubItems, PerplexityEvaluation):
    """The perplexity of a dataset's texts. Of a dialogue these are its messages, with the answer after ``Answer:``."""

    def item_of(self, row: Mapping[str, Any]) -> str | None:
        """The text of a row; ``None`` for an empty one."""
        if self.dataset.kind != "text":
            return "".join(question_and_answer(self.dataset.record(row)))
        text = row[self.dataset.text_key] if self.dataset.record is None else self.dataset.record(row)
        return text or None


def question_and_answer(messages: Messages) -> tuple[str, str]:
    """A prompt, which ends in ``Answer:``, and the answer, which begins with a space."""
    question, answer = (message["content"] for message in messages)
    return f"{question}\nAnswer:", f" {answer}"


@dataclass(frozen=True)
class _WholeRows:
    """Reads whole rows, as JSON."""

    keys: ClassVar[None] = None
    kind: ClassVar[RowKind] = "text"

    def identity(self) -> dict[str, Any]:
        return {}

    def document(self, row: Any, where: str) -> str:
        return json.dumps(row, default=str)
