"""Parts of a local file. One process finds them, reading as little as possible, and any other can read them.

kind of file                        a part                                                 found by
JSON lines                          a range of bytes that ends at a line end               counting line ends
JSON lines, compressed              the lines themselves                                   decompressing
text                                the whole file, or a piece of a long one               looking for a line end
parquet                             a row group, or the texts of a very large one          the footer
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from tinytron.errors import DataError
from tinytron.text.rows import RowReader
from tinytron.utils.optional import as_data_error, require_package
from tinytron.utils.texts import without_bom

# Each line is a JSON object; compressed .json files of large corpora have this form too.
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PIECE_BYTES = 2**20  # a longer text file becomes several documents, cut at line ends
BLOCK_BYTES = 2**22  # read from a file of lines at a time
GROUP_BYTES = 2**26  # one process reads larger row groups itself, instead of handing them to workers


class Place(NamedTuple):
    """A place between two documents: in file number ``file``, at ``at`` (byte, row group or row), after ``passed`` lines of
    the file or rows of the row group."""

    file: int = 0
    at: int = 0
    passed: int = 0


@dataclass(frozen=True)
class Part:
    """Consecutive documents of one file: bytes ``start`` to ``stop``, or row group ``start``; or, in ``data``, the lines or
    texts themselves. ``first`` is the number of its first line or row, from 1."""

    path: str
    start: int = 0
    stop: int = 0
    first: int = 1
    data: bytes | list[str] | None = None


class Found(NamedTuple):
    """A part, the place after it, its number of documents, its approximate bytes in memory, the bytes of the file up to its
    end, and whether it is held out."""

    part: Part
    after: Place
    documents: int
    bytes: int
    position: int
    held_out: bool = False


def is_plain_text(path: Path) -> bool:
    """True if the file is one document, not a file of many."""
    return not path.name.endswith(LINE_SUFFIXES) and path.suffix != ".parquet"


def find_parts(path: Path, place: Place, limit: int, rows: RowReader, held_out_end: float = 0.0) -> Iterator[Found]:
    """The parts of a file after ``place``, each of at most ``limit`` documents except for whole row groups. The last
    ``held_out_end`` of a plain text's bytes, from the next line on, is held out. Raises: DataError naming the file."""
    with as_data_error(str(path)):
        if path.name.endswith(LINE_SUFFIXES):
            yield from _find_lines(path, place, limit)
        elif path.suffix == ".parquet":
            yield from _find_groups(path, place, limit, rows)
        else:
            yield from _find_pieces(path, place, held_out_end)


def read_part(part: Part, rows: RowReader) -> Iterator[str]:
    """The documents of a part. Raises: DataError naming file and line or row."""
    path = Path(part.path)
    if isinstance(part.data, list):
        yield from part.data
    elif path.name.endswith(LINE_SUFFIXES):
        yield from _read_lines(part, rows)
    elif path.suffix == ".parquet":
        with as_data_error(part.path), _open_parquet(path) as file:
            group = file.read_row_group(part.start, rows.keys and list(rows.keys))
            for number, row in enumerate(group.to_pylist(), part.first):
                yield rows.document(row, f"{part.path}: row {number}")
    else:
        with as_data_error(part.path):
            content = _bytes_of(part) if part.start else without_bom(_bytes_of(part))
            try:  # normalize line ends to \n, as Python does
                text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
            except UnicodeDecodeError as error:
                advice = "convert the file to UTF-8, for example with iconv -f latin1 -t utf-8"
                raise DataError(f"{part.path}: {error}; {advice}") from error
            yield text


def _bytes_of(part: Part) -> bytes:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        content = file.read(part.stop - part.start)
    if len(content) != part.stop - part.start:
        raise DataError(f"{part.path} became shorter while it was being read; do not change it until it is tokenized")
    return content


def require_keys(rows: RowReader, names: Collection[str], where: str) -> None:
    """Raises: DataError starting with ``where`` if columns called ``names`` lack one that ``rows`` reads."""
    if not set(rows.keys or ()) <= set(names):
        rows.document(dict.fromkeys(names), where)


# Lines.


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file's content, and the file itself, whose position shows how much of it has been read."""
    with contextlib.ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(open(path, "rb"))
        content = raw
        if path.suffix == ".gz":
            content = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=raw)))
        elif path.suffix == ".zst":
            arrow = require_package("pyarrow")
            stream = arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
            content = stack.enter_context(io.BufferedReader(stream, 2**20))
        yield content, raw


def _find_lines(path: Path, place: Place, limit: int) -> Iterator[Found]:
    with _unpacked(path) as (file, raw):
        start, count = place.at, place.passed
        packed = file is not raw
        if packed:
            _skip(file, start)
        else:
            file.seek(start)
        while block := file.read(BLOCK_BYTES):
            block += file.readline()
            for piece, lines in _line_pieces(block, limit):
                stop, first = start + len(piece), count + 1
                start, count, data = stop, count + lines, piece if packed else None
                part = Part(str(path), stop - len(piece), stop, first, data)
                yield Found(part, Place(place.file, start, count), lines, len(piece), raw.tell() if packed else stop)


def _line_pieces(block: bytes, limit: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines, ``limit`` at a time, and their number."""
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if lines <= limit:
        yield block, lines
        return
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    cuts = [0, *(int(end) for end in ends[limit - 1 :: limit] if end < len(block)), len(block)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        yield block[start:stop], min(limit, lines - number * limit)


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0 and (block := file.read(min(count, BLOCK_BYTES))):
        count -= len(block)


def _read_lines(part: Part, rows: RowReader) -> Iterator[str]:
    with as_data_error(part.path):
        content = part.data if isinstance(part.data, bytes) else _bytes_of(part)
    for number, line in enumerate(content.split(b"\n"), part.first):
        line = without_bom(line)  # concatenated files have one in the middle, too
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            found = " ".join(str(error).split())
            raise DataError(f"{part.path}, line {number}: {found}; give one JSON object per line, in UTF-8") from error
        yield rows.document(row, f"{part.path}, line {number}")


# Text.


def _find_pieces(path: Path, place: Place, held_out_end: float) -> Iterator[Found]:
    start = place.at
    with open(path, "rb") as file:
        size = path.stat().st_size
        held_out = _held_out_start(file, int(size * (1 - held_out_end)), size) if held_out_end and size else size
        while start < size:
            limit = held_out if start < held_out else size
            stop = min(limit, start + PIECE_BYTES)
            if stop < limit:
                file.seek(stop)
                line = file.readline(PIECE_BYTES)
                stop = min(limit, stop + len(line))
                if not line.endswith(b"\n") and stop < limit:
                    stop = _character_start(file, stop)
            part = Part(str(path), start, stop)
            yield Found(part, Place(place.file, stop), 1, stop - start, stop, held_out=start >= held_out)
            start = stop


def _held_out_start(file: IO[bytes], at: int, size: int) -> int:
    """The next byte after ``at`` that begins a line, or a character if no line begins nearby."""
    file.seek(at)
    line = file.readline(PIECE_BYTES)
    if line.endswith(b"\n") and at + len(line) < size:
        return at + len(line)
    return _character_start(file, at)


def _character_start(file: IO[bytes], at: int) -> int:
    """The last byte up to ``at`` that begins a UTF-8 character, which has at most four bytes."""
    for place in range(at, at - 4, -1):
        file.seek(place)
        if file.read(1)[0] & 0xC0 != 0x80:
            return place
    return at


# Parquet.


def _open_parquet(path: Path) -> Any:
    require_package("pyarrow")
    return require_package("pyarrow.parquet").ParquetFile(path)


def _find_groups(path: Path, place: Place, limit: int, rows: RowReader) -> Iterator[Found]:
    with _open_parquet(path) as file:
        meta, size = file.metadata, path.stat().st_size
        names = file.schema_arrow.names
        require_keys(rows, names, f"{path}: row 1")
        columns = [meta.schema.column(i).path for i in range(meta.num_columns)]
        mine = [i for i, name in enumerate(columns) if rows.keys is None or name.partition(".")[0] in rows.keys]
        row = 0
        for group in range(meta.num_row_groups):
            count = meta.row_group(group).num_rows
            skipped = place.passed if group == place.at else 0
            if group >= place.at and count > skipped:
                held = sum(meta.row_group(group).column(i).total_uncompressed_size for i in mine)
                position = size * (row + count) // meta.num_rows
                after = Place(place.file, group + 1)
                if held <= GROUP_BYTES and not skipped:
                    yield Found(Part(str(path), group, group + 1, row + 1), after, count, held, position)
                else:
                    at = Place(place.file, group, skipped)
                    batches = file.iter_batches(limit, [group], rows.keys and list(rows.keys))
                    for part, done in _texts_of_group(batches, str(path), row, skipped, rows):
                        end = at._replace(passed=done) if done < count else after
                        texts = part.data or []
                        chars = sum(len(text) for text in texts if isinstance(text, str))
                        yield Found(part, end, len(texts), chars, size * (row + done) // meta.num_rows)
            row += count


def _texts_of_group(batches: Any, path: str, before: int, skipped: int, rows: RowReader) -> Iterator[tuple[Part, int]]:
    """The texts of a row group after the first ``skipped``, and the number of its rows that are then done; ``before`` rows
    of the file come before the row group."""
    done = 0
    for batch in batches:
        found = batch.to_pylist()[max(0, skipped - done) :]
        done += batch.num_rows
        first = before + done - len(found) + 1
        texts = [rows.document(row, f"{path}: row {n}") for n, row in enumerate(found, first)]
        if texts:
            yield Part(path, first=first, data=texts), done
