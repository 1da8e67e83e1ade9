"""Documents as text: found in local folders, taken out of rows, filtered, shuffled, tokenised. All of these are
generators, so that a pipeline of them holds one batch, whatever the size of the source. Files: ``sources.py``."""

from __future__ import annotations

import contextlib
import glob
import importlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinytron.errors import ConfigError, DataError, TinytronError

# Each line a JSON object; the compressed .json files of large corpora are that too.
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html")
CODE = (
    *(".py", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".cs", ".java", ".kt", ".scala", ".go"),
    *(".rs", ".js", ".jsx", ".ts", ".tsx", ".css", ".php", ".rb", ".pl", ".lua", ".swift", ".jl", ".r", ".hs", ".ml"),
    *(".ex", ".erl", ".clj", ".sh", ".sql", ".f90", ".cmake", ".yaml", ".yml", ".toml"),
)
SUFFIXES = (*PROSE, *CODE, *LINE_SUFFIXES, ".parquet")
BATCH_CHARS = 2**20  # tokenised at a time


def find_text_files(path: str) -> list[Path]:
    """The readable files below the folder ``path`` (hidden ones left out), those a pattern matches, or the one file;
    sorted. Raises: DataError if there is none."""
    place = Path(path)
    if place.is_dir():
        found = [p for p in place.rglob("*") if not any(part.startswith(".") for part in p.relative_to(place).parts)]
    else:
        found = [Path(p) for p in glob.glob(path)] or [place]
    if not any(p.exists() for p in [place, *found]):
        raise DataError(f"--dataset_path {path}: there is no such file or folder")
    files = sorted(p for p in found if p.name.endswith(SUFFIXES) and p.is_file())
    if not files:
        raise DataError(
            f"--dataset_path {path} has no token shards (train_*.bin) and no text; give a file, or a folder with files, "
            f"that end in {', '.join(LINE_SUFFIXES)}, .parquet, .txt, .md, .py or a similar suffix of prose or code"
        )
    return files


def stream_rows(where: str, *args: Any, advice: str = "", **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The rows that ``datasets.load_dataset(...)`` streams. Raises: DataError starting with ``where`` and ending in
    ``advice``, whatever goes wrong there; ConfigError without the package."""
    datasets = require_package("datasets")
    with as_data_error(where, advice):
        yield from datasets.load_dataset(*args, streaming=True, **kwargs)


def texts_of(rows: Iterable[Any], text_key: str, where: str, option: str = "the text key") -> Iterator[str]:
    """``row[text_key]`` of every row; a null is an empty text. Raises: DataError for rows without such a text."""
    for count, row in enumerate(rows, 1):
        yield text_of(row, text_key, f"{where}: row {count}", option)


def text_of(row: Any, text_key: str, where: str, option: str = "the text key") -> str:
    """``row[text_key]``; a null is an empty text. Raises: DataError that starts with ``where`` for a row without one."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is {type(row).__name__}, not an object with keys")
    if text_key not in row:
        keys = ", ".join(map(str, row)) or "no key at all"
        raise DataError(f"{where} has no key {text_key!r}; set {option} to one that it has: {keys}")
    text = row[text_key]
    if not isinstance(text, str | None):
        kind = type(text).__name__
        raise DataError(f"{where}: {text_key!r} is {kind}, not text; set {option} to another key")
    return text or ""


def long_enough(texts: Iterable[str], min_chars: int, option: str = "the minimum ") -> Iterator[str]:
    """The texts with at least ``min_chars`` characters, white space around them not counted, and at least one. Raises:
    DataError if there is none, naming ``option``, which sets the minimum."""
    count = kept = longest = 0
    for text in texts:
        count, length = count + 1, len(text.strip())
        longest = max(longest, length)
        if length >= max(1, min_chars):
            kept += 1
            yield text
    if not kept:
        advice = f"use {option}{longest} or less" if longest else "all are empty"
        raise DataError(f"none of {count} documents has {option}{min_chars} characters; {advice}")


def shuffled(texts: Iterable[str], buffer_size: int, seed: int) -> Iterator[str]:
    """The same texts in an order that ``seed`` decides: each leaves a buffer of ``buffer_size`` at random when another
    comes in. A buffer of 0 or 1 keeps the order."""
    buffer: list[str] = []
    chance, buffer_size = random.Random(seed), max(1, buffer_size)
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        place = chance.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = text
    chance.shuffle(buffer)
    yield from buffer


def tokenised(
    texts: Iterable[str], encode: Callable[[list[str]], Sequence[list[int]]], end: Sequence[int] = ()
) -> Iterator[list[int]]:
    """The token ids of every text, followed by ``end``; ``encode`` gets about ``BATCH_CHARS`` characters at a time."""
    for batch in _batches(texts):
        for ids in encode(batch):
            yield [*ids, *end]


def whole_characters(text: str) -> str:
    """``text`` with ``?`` for half of a surrogate pair, which JSON can spell but is no character: tokenizers refuse it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(whole_characters(text))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def as_data_error(where: str, advice: str = "") -> Iterator[None]:
    """Any exception of other people's code as a one-line DataError that starts with ``where`` and ends in ``advice``."""
    try:
        yield
    except TinytronError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        shown = text if len(text) <= 300 else text[:297] + "..."
        raise DataError(f"{where}: {shown.rstrip('.') or type(error).__name__}{advice and f'; {advice}'}") from error


def require_package(name: str) -> Any:
    """Import an optional package. Raises: ConfigError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'the package {name.partition(".")[0]} is needed ({error}); run: pip install "tinytron[data]"'
        ) from error
