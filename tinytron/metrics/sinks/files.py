"""The two log files of a run: ``log.txt`` to read and compare, and ``log.jsonl`` with all values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinytron.errors import StorageError
from tinytron.metrics.sinks.base import Record, RunInfo, Sink
from tinytron.utils.training import write_atomically


class LogFile(Sink):
    """A file of lines in the run's folder. Subclasses define its name, the line for a record, and the step of a line."""

    name: str
    path: Path

    def open(self, run: RunInfo) -> None:
        self.path = run.folder / self.name

    def resume(self, step: int) -> None:
        """Drop the lines after ``step``, and a line that a crash cut short."""
        keep_lines(self.path, lambda line: self.step_of(line) <= step)

    def write(self, records: Sequence[Record]) -> None:
        """Raises: StorageError if the system refuses."""
        try:
            append(self.path, "".join(map(self.line, records)))
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written ({error.strerror})") from error

    def line(self, record: Record) -> str:
        """The record as a line, with its newline, or an empty string."""
        raise NotImplementedError

    def step_of(self, line: bytes) -> int:
        """The step of a line. Raises: ValueError if the line is incomplete."""
        raise NotImplementedError


class TextLog(LogFile):
    """Lines ``<step> train <loss>`` and ``<step> val <loss>`` with ten significant digits, which is enough to compare
    runs."""

    name = "log.txt"
    files = (name,)

    def line(self, record: Record) -> str:
        """The line of a record; empty for records without a loss (eval)."""
        return f"{record['step']} {record['stage']} {record['loss']:#.10g}\n" if "loss" in record else ""

    def step_of(self, line: bytes) -> int:
        step, _, _ = line.split()
        return int(step)


class JsonLog(LogFile):
    """One JSON object per record."""

    name = "log.jsonl"
    files = (name,)

    def line(self, record: Record) -> str:
        return json_line(record)

    def step_of(self, line: bytes) -> int:
        return int(json.loads(line)["step"])


def append(path: Path, lines: str) -> None:
    """Append all of ``lines`` to a file, or none of them: a full disk may accept only a part, which is then removed."""
    path.parent.mkdir(parents=True, exist_ok=True)  # the user may have removed it during the run
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        content = memoryview(lines.encode())
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(before)
            raise


def json_line(entry: Record) -> str:
    """``entry`` as one line of JSON. JSON has no NaN or infinity, so these become text, at any depth."""
    return json.dumps(_finite(entry)) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines(path: Path, wanted: Callable[[bytes], bool]) -> None:
    """Keep only the lines of a file for which ``wanted`` is true; does nothing if the file does not exist. Incomplete lines
    are dropped: ``wanted`` may raise a ValueError for them."""
    if path.exists():
        write_atomically(path, lambda file: file.writelines(_kept_lines(path, wanted)))


def _kept_lines(path: Path, wanted: Callable[[bytes], bool]) -> Iterator[bytes]:
    """The lines to keep, one at a time, because a route trace can be larger than memory."""
    with open(path, "rb") as file:
        for line in file:
            try:
                keep = line.endswith(b"\n") and wanted(line)
            except ValueError:  # an incomplete line: the process was killed while writing it
                continue
            if keep:
                yield line
