"""Sources of documents, in chunks that any process can read independently.

one process: ``source.chunks(...)`` -> Chunk, Chunk, ... (places in files, found without reading texts where possible)
any process: ``source.read(chunk)`` -> the chunk's texts

A chunk includes the place after it, from which ``chunks`` continues in a later run. How documents are grouped into chunks
changes neither the documents nor their order.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tinytron.errors import ConfigError, DataError
from tinytron.text.parts import (
    LINE_SUFFIXES,
    PIECE_BYTES,
    Part,
    Place,
    find_parts,
    is_plain_text,
    read_part,
    require_keys,
)
from tinytron.text.rows import RowReader, TextRows
from tinytron.utils.optional import as_data_error, require_package
from tinytron.utils.paths import files_below

PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html")
CODE = (
    *(".py", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".cs", ".java", ".kt", ".scala", ".go"),
    *(".rs", ".js", ".jsx", ".ts", ".tsx", ".css", ".php", ".rb", ".pl", ".lua", ".swift", ".jl", ".r", ".hs", ".ml"),
    *(".ex", ".erl", ".clj", ".sh", ".sql", ".f90", ".cmake", ".yaml", ".yml", ".toml"),
)
SUFFIXES = (*PROSE, *CODE, *LINE_SUFFIXES, ".parquet")
CHUNK_BYTES = 2**24  # approximate maximum size of a chunk
FEW_HELD_OUT = 5  # documents; with fewer, the hash may hold out none by chance
MANY_FILES = 1000  # more files are recorded as one hash instead of one by one
START = Place()


@dataclass(frozen=True)
class Chunk:
    """Some parts, the place after them, how much of the source (in its unit) comes before that place, and whether all of
    their documents are ``held_out`` for validation."""

    parts: list[Part]
    after: Place
    done: int
    held_out: bool = False


class TextSource(Protocol):
    """A corpus. Picklable, so that worker processes can read chunks."""

    def size(self) -> tuple[int | None, str]:
        """The size of the source, if known, and its unit: ``B`` or ``row``."""

    def identity(self) -> dict[str, Any]:
        """Plain JSON values that name the source and show whether it has changed."""

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """The documents after ``start``, about ``chunksize`` at a time. Raises: DataError."""

    def read(self, chunk: Chunk) -> Iterator[str]:
        """The texts of a chunk. Raises: DataError naming file and line or row."""


@dataclass(frozen=True)
class FileSource:
    """Local files: what ``rows`` reads of each row of JSON lines and parquet files; any other file is one document, or
    several if it is long. ``path`` is the user's name for the files, and ``val_path`` names the files after the first
    ``num_training``, which are held out. ``held_out_end`` is the fraction of every text file that is held out, at its
    end."""

    files: list[Path]
    rows: RowReader = field(default_factory=TextRows)
    path: str = ""
    val_path: str | None = None
    num_training: int | None = None
    held_out_end: float = 0.0

    def size(self) -> tuple[int | None, str]:
        """The bytes of all files."""
        return sum(path.stat().st_size for path in self.files), "B"

    def identity(self) -> dict[str, Any]:
        """Path, size and time of every file."""
        known = {"path": self.path, **self.rows.identity(), "files": _facts_of(self.files)}
        if self.held_out_end:
            known["held_out"] = "ends"
        return known if self.val_path is None else known | {"val_path": self.val_path}

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """See ``TextSource``."""
        with as_data_error("the source"):
            sizes = [path.stat().st_size for path in self.files]
        before = [0, *itertools.accumulate(sizes)]
        first_held_out = len(self.files) if self.num_training is None else self.num_training
        parts: list[Part] = []
        documents = size = done = 0
        after, of_val = start, False
        for number in range(start.file, len(self.files)):
            place = start if number == start.file else Place(number)
            known = (chunksize, self.rows, self.held_out_end)
            for found in find_parts(self.files[number], place, *known):
                held_out = found.held_out or number >= first_held_out
                if parts and held_out != of_val:
                    yield Chunk(parts, after, done, of_val)
                    parts, documents, size = [], 0, 0
                parts.append(found.part)
                documents += found.documents
                size += found.bytes
                after, done, of_val = found.after, before[number] + found.position, held_out
                if documents >= chunksize or size >= CHUNK_BYTES:
                    yield Chunk(parts, after, done, of_val)
                    parts, documents, size = [], 0, 0
        if parts:
            yield Chunk(parts, Place(len(self.files)), before[-1], of_val)

    def read(self, chunk: Chunk) -> Iterator[str]:
        """See ``TextSource``."""
        for part in chunk.parts:
            yield from read_part(part, self.rows)


@dataclass
class HubSource:
    """A dataset of the ``datasets`` package: a name on the hub, a folder in the layout of the hub, or one that
    ``save_to_disk`` wrote. Loaded when it is first needed; ``streaming`` reads it row by row and keeps no copy."""

    path: str
    config: str | None
    split: str
    rows: RowReader
    streaming: bool
    cache_dir: str | None = None
    loaded: Any = None

    @property
    def where(self) -> str:
        """Its name in errors."""
        config = f" --dataset_name {self.config}" if self.config else ""
        return f"--dataset_path {self.path}{config} --dataset_split {self.split}"

    def size(self) -> tuple[int | None, str]:
        """The number of rows, unless it is streamed."""
        return (None if self.streaming else len(self._load())), "row"

    def identity(self) -> dict[str, Any]:
        """Its names, and the files of a local folder."""
        names = {"path": self.path, "config": self.config, "split": self.split, **self.rows.identity()}
        return names | {"files": _facts_of([Path(self.path)])}

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """See ``TextSource``."""
        rows = self._load()
        with as_data_error(self.where):
            if self.streaming:
                yield from self._stream(rows, chunksize, start.at)
                return
            for first in range(start.at, len(rows), chunksize):
                stop = min(first + chunksize, len(rows))
                yield Chunk([Part(self.where, first, stop, first + 1)], Place(at=stop), stop)

    def _stream(self, rows: Any, chunksize: int, done: int) -> Iterator[Chunk]:
        texts: list[str] = []
        size, first = 0, done + 1
        for row in rows.skip(done) if done else rows:
            texts.append(self.rows.document(row, f"{self.where}: row {done + 1}"))
            done, size = done + 1, size + len(texts[-1])
            if len(texts) >= chunksize or size >= CHUNK_BYTES:
                yield Chunk([Part(self.where, first=first, data=texts)], Place(at=done), done)
                texts, size, first = [], 0, done + 1
        if texts:
            yield Chunk([Part(self.where, first=first, data=texts)], Place(at=done), done)

    def read(self, chunk: Chunk) -> Iterator[str]:
        """See ``TextSource``."""
        for part in chunk.parts:
            if isinstance(part.data, list):
                yield from part.data
                continue
            with as_data_error(self.where):
                columns = self._load()[part.start : part.stop]
            found = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            for number, row in enumerate(found, part.first):
                yield self.rows.document(row, f"{self.where}: row {number}")

    def __getstate__(self) -> dict[str, Any]:
        # One process reads a stream; other processes map the files of a loaded dataset.
        return self.__dict__ | ({"loaded": None} if self.streaming else {})

    def _load(self) -> Any:
        if self.loaded is None:
            datasets = require_package("datasets")
            with as_data_error(self.where, "check the names and the network, or give a local file or folder"):
                if _is_saved(self.path):
                    rows = datasets.load_from_disk(self.path)
                    rows = rows[self.split] if isinstance(rows, datasets.DatasetDict) else rows
                    rows = rows.to_iterable_dataset() if self.streaming else rows
                else:
                    options = {"split": self.split, "cache_dir": self.cache_dir, "streaming": self.streaming}
                    rows = datasets.load_dataset(self.path, self.config, **options)
            names = rows.column_names
            keys = self.rows.keys
            if names is not None:
                require_keys(self.rows, names, f"{self.where}: row 1")
            self.loaded = rows if names is None or keys is None else rows.select_columns(list(keys))
        return self.loaded


def open_source(
    path: str,
    *,
    config: str | None,
    split: str,
    rows: RowReader,
    streaming: bool,
    cache_dir: str | None,
    val_path: str | None = None,
    val_fraction: float = 0.0,
) -> TextSource:
    """Local files if ``path`` is a file, a pattern or a folder; the ``datasets`` package for a folder that it saved, a
    folder with a ``config``, and any other name. The local files of ``val_path`` are held out. If ``val_fraction`` of a few
    plain texts is less than ``FEW_HELD_OUT`` documents, the ends of the files are held out instead.

    Raises: DataError for a path without text, and for plain texts where ``rows`` needs rows; ConfigError for a file with a
    ``config``, and for ``val_path`` with a dataset of the ``datasets`` package.
    """
    if _is_local(path, config):
        if config:
            raise ConfigError(
                f"--dataset_name {config} is for datasets on the hub, but --dataset_path {path} is local; leave it out"
            )
        files = find_text_files(path)
        _require_rows(rows, files)
        if val_path is None:
            few = all(map(is_plain_text, files)) and val_fraction * _count_pieces(files) < FEW_HELD_OUT
            return FileSource(files, rows, path, held_out_end=val_fraction if few else 0.0)
        held_out = find_text_files(val_path, "--val_path")
        _require_rows(rows, held_out)
        return FileSource([*files, *held_out], rows, path, val_path, len(files))
    if val_path is not None:
        raise ConfigError(f"--val_path {val_path} needs local files; for a dataset on the hub use --val_fraction 0.01")
    return HubSource(path, config, split, rows, streaming, cache_dir)


def _require_rows(rows: RowReader, files: Sequence[Path]) -> None:
    reads_records = rows.kind != "text" or rows.keys is None
    if reads_records and (plain := next(filter(is_plain_text, files), None)) is not None:
        raise DataError(f"{plain} is plain text, which has no rows with {rows.kind}; give .jsonl or .parquet files")


def _count_pieces(files: Sequence[Path]) -> int:
    with as_data_error("the source"):
        return sum(-(-path.stat().st_size // PIECE_BYTES) for path in files)


def _is_local(path: str, config: str | None) -> bool:
    """True if ``path`` is read as local files, and not by the ``datasets`` package."""
    place = Path(path)
    if place.is_dir():
        return not config and not _is_saved(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or any(c in path for c in "*?[")
    return place.exists() or looks_local or path.endswith(SUFFIXES)


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def find_text_files(path: str, option: str = "--dataset_path") -> list[Path]:
    """The readable files in and below the folder ``path`` (without hidden ones, following links), those that match a
    pattern, or the one file; sorted. Raises: DataError naming ``option`` if there are none."""
    place = Path(path)
    found = list(files_below(place, hidden=False)) if place.is_dir() else [Path(p) for p in glob.glob(path)]
    found = found or [place]
    if not any(p.exists() for p in [place, *found]):
        raise DataError(f"{option} {path}: there is no such file or folder")
    files = sorted(p for p in found if p.name.endswith(SUFFIXES) and p.is_file())
    if not files:
        raise DataError(
            f"{option} {path} has no token shards (train_*.bin) and no text; give a file, or a folder with files, "
            f"that end in {', '.join(LINE_SUFFIXES)}, .parquet, .txt, .md, .py or a similar suffix of prose or code"
        )
    return files


def file_states(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, size and modification time of the files among ``paths`` and of all files below folders among them; a path that
    does not exist (a name on the hub) adds nothing. Raises: OSError."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(files_below(path)))]
    return [[str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


def _facts_of(paths: Iterable[Path]) -> list[dict[str, Any]] | dict[str, Any]:
    return files_in_brief(
        [dict(zip(("path", "bytes", "modified"), state, strict=True)) for state in file_states(paths)]
    )


def files_in_brief(facts: list[dict[str, Any]]) -> list[dict[str, Any]] | dict[str, Any]:
    """The facts; for very many files, their number, bytes and one hash, because every run reads them at its start."""
    if len(facts) <= MANY_FILES:
        return facts
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"number": len(facts), "bytes": sum(fact["bytes"] for fact in facts), "sha256": digest}
