"""``log.csv``: the records as a table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinytron.errors import StorageError
from tinytron.metrics.sinks.base import Record, RunInfo, Sink
from tinytron.metrics.sinks.files import append
from tinytron.metrics.sinks.flat import flat_record
from tinytron.utils.training import write_atomically


class CsvLog(Sink):
    """A row per record, with the columns ``step`` and ``stage`` and one per number, named as ``flat_record`` does. A number
    that appears for the first time adds a column, for which the file is written again."""

    name = "log.csv"
    files = (name,)

    def open(self, run: RunInfo) -> None:
        self.path = run.folder / self.name

    def resume(self, step: int) -> None:
        """Drop the rows after ``step``, and a row that a crash cut short."""
        self._columns = ["step", "stage"]
        if self.path.exists():
            self._rewrite(_rows(self.path), step)

    def write(self, records: Sequence[Record]) -> None:
        """Raises: StorageError if the system refuses."""
        rows = [{"step": r["step"], "stage": r["stage"], **flat_record(r)} for r in records]
        columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row)]))
        try:
            if columns != self._columns or not self.path.exists():
                known = _rows(self.path) if self.path.exists() else []
                self._columns, before = columns, self._columns
                try:
                    self._rewrite(known)
                except OSError:
                    self._columns = before
                    raise
            append(self.path, _text(rows, self._columns))
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written ({error.strerror})") from error

    def _rewrite(self, rows: Iterable[dict[str, str]], last: float = float("inf")) -> None:
        kept = [row for row in rows if int(row["step"]) <= last]
        self._columns = list(dict.fromkeys([*self._columns, *(name for row in kept[:1] for name in row)]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = _text([dict(zip(self._columns, self._columns, strict=True))], self._columns)
        write_atomically(self.path, lambda file: file.write((header + _text(kept, self._columns)).encode()))


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of the file. A row that was cut short has no newline at its end."""
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in reader if (row.get("step") or "").isdecimal()]


def _text(rows: Iterable[dict[str, object]] | Iterable[dict[str, str]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writerows(rows)
    return out.getvalue()
