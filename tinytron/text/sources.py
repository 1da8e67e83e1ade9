"""Where documents come from, in chunks that any process can read on its own.

one process: ``source.chunks(...)`` -> Chunk, Chunk, ... (places in files, found without reading texts where possible)
any process: ``source.read(chunk)`` -> the chunk's texts

A chunk knows the place behind it, from which ``chunks`` goes on in a later run. How documents are cut into chunks changes
neither them nor their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinytron.data.documents import SUFFIXES, as_data_error, find_text_files, require_package, text_of
from tinytron.data.prepare import file_states
from tinytron.errors import ConfigError
from tinytron.text.parts import Part, Place, find_parts, read_part

CHUNK_BYTES = 2**24  # about the most that one chunk holds
START = Place()


@dataclass(frozen=True)
class Chunk:
    """Some parts, the place behind them, and how much of the source (in its unit) lies before that."""

    parts: list[Part]
    after: Place
    done: int


class Source(Protocol):
    """A corpus. Picklable, so that workers can read chunks."""

    def size(self) -> tuple[int | None, str]:
        """How large the source is, if that is known, and its unit: ``B`` or ``row``."""

    def facts(self) -> dict[str, Any]:
        """What names it, and tells whether it has changed: plain JSON values."""

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """What lies behind ``start``, about ``chunksize`` documents at a time. Raises: DataError."""

    def read(self, chunk: Chunk) -> Iterator[str]:
        """The texts of a chunk. Raises: DataError naming file and line or row."""


@dataclass(frozen=True)
class FileSource:
    """Local files: the ``text_key`` of each row of JSON lines and parquet files; any other file is one document, or
    several if it is long. ``option`` names what sets the text key; ``path`` is what the user called the files."""

    files: list[Path]
    text_key: str = "text"
    option: str = "the text key"
    path: str = ""

    def size(self) -> tuple[int | None, str]:
        """The bytes of all files."""
        return sum(path.stat().st_size for path in self.files), "B"

    def facts(self) -> dict[str, Any]:
        """Path, size and time of every file."""
        states = [{"path": path, "bytes": size, "modified": time} for path, size, time in file_states(self.files)]
        return {"path": self.path, "text_key": self.text_key, "files": states}

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """See ``Source``."""
        parts: list[Part] = []
        documents = size = 0
        with as_data_error("the source"):
            sizes = [path.stat().st_size for path in self.files]
        for number in range(start.file, len(self.files)):
            place, before = start if number == start.file else Place(number), sum(sizes[:number])
            for found in find_parts(self.files[number], place, chunksize, self.text_key, self.option):
                parts.append(found.part)
                documents, size = documents + found.documents, size + found.bytes
                if documents >= chunksize or size >= CHUNK_BYTES:
                    yield Chunk(parts, found.after, before + found.position)
                    parts, documents, size = [], 0, 0
        if parts:
            yield Chunk(parts, Place(len(self.files)), sum(sizes))

    def read(self, chunk: Chunk) -> Iterator[str]:
        """See ``Source``."""
        for part in chunk.parts:
            yield from read_part(part, self.text_key, self.option)


def read_texts(files: Iterable[Path], text_key: str = "text", option: str = "the text key") -> Iterator[str]:
    """The documents of ``files``, one after another. Raises: DataError naming file and line, and ``option``, which sets
    the text key."""
    source = FileSource(list(files), text_key, option)
    for chunk in source.chunks(1024):
        yield from source.read(chunk)


@dataclass
class HubSource:
    """A data set of the ``datasets`` package: a name on the hub, a folder in the layout of the hub, or one that
    ``save_to_disk`` wrote. Loaded when it is first needed; ``streaming`` reads it row by row and keeps no copy."""

    path: str
    config: str | None
    split: str
    text_key: str
    option: str
    streaming: bool
    cache_dir: str | None = None
    loaded: Any = None

    @property
    def where(self) -> str:
        """How errors call it."""
        config = f" --dataset_name {self.config}" if self.config else ""
        return f"--dataset_path {self.path}{config} --dataset_split {self.split}"

    def size(self) -> tuple[int | None, str]:
        """The number of rows, unless it is streamed."""
        return (None if self.streaming else len(self._load())), "row"

    def facts(self) -> dict[str, Any]:
        """Its names; of a local folder the files too."""
        states = [{"path": p, "bytes": size, "modified": time} for p, size, time in file_states([Path(self.path)])]
        names = {"path": self.path, "config": self.config, "split": self.split, "text_key": self.text_key}
        return names | {"files": states}

    def chunks(self, chunksize: int, start: Place = START) -> Iterator[Chunk]:
        """See ``Source``."""
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
            texts.append(text_of(row, self.text_key, f"{self.where}: row {done + 1}", self.option))
            done, size = done + 1, size + len(texts[-1])
            if len(texts) >= chunksize or size >= CHUNK_BYTES:
                yield Chunk([Part(self.where, first=first, data=texts)], Place(at=done), done)
                texts, size, first = [], 0, done + 1
        if texts:
            yield Chunk([Part(self.where, first=first, data=texts)], Place(at=done), done)

    def read(self, chunk: Chunk) -> Iterator[str]:
        """See ``Source``."""
        for part in chunk.parts:
            if isinstance(part.data, list):
                yield from part.data
                continue
            with as_data_error(self.where):
                texts = self._load()[part.start : part.stop][self.text_key]
            for row, text in enumerate(texts, part.first):
                yield text_of({self.text_key: text}, self.text_key, f"{self.where}: row {row}", self.option)

    def __getstate__(self) -> dict[str, Any]:
        # A stream is read by one process; the rows of a loaded data set lie in files that others map as well.
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
            if names is not None and self.text_key not in names:
                text_of(dict.fromkeys(names), self.text_key, f"{self.where}: row 1", self.option)
            self.loaded = rows.select_columns([self.text_key]) if names is not None else rows
        return self.loaded


def open_source(
    path: str, *, config: str | None, split: str, text_key: str, streaming: bool, cache_dir: str | None
) -> Source:
    """Local files if ``path`` is a file, a pattern or a folder; the ``datasets`` package for a folder that it saved, a
    folder with a ``config``, and any other name. Raises: DataError for a path without text; ConfigError for a file with
    a ``config``."""
    place, option = Path(path), "--dataset_text_key"
    hub = HubSource(path, config, split, text_key, option, streaming, cache_dir)
    if place.is_dir() and (config or _is_saved(path)):
        return hub
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or any(c in path for c in "*?[")
    if not place.exists() and not looks_local and not path.endswith(SUFFIXES):
        return hub
    if config:
        raise ConfigError(
            f"--dataset_name {config} is of data sets on the hub, and --dataset_path {path} is a file; leave it out"
        )
    return FileSource(find_text_files(path), text_key, option, path)


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
