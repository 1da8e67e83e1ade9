"""The two log files of a run: ``log.txt`` for reading and comparing, ``log.jsonl`` with everything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinytron.utils.training import write_atomically

ROUTES = "routes_rank{}.jsonl"  # by rank; written by RoutingReport


class RunLog:
    """Lines ``<step> train <loss>`` and ``<step> val <loss>`` in ``log.txt``, one JSON object per line in ``log.jsonl``.

    Losses are written with ten significant digits, enough to compare runs. ``keep_until`` is called once after resuming.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._text, self._json = folder, folder / "log.txt", folder / "log.jsonl"
        self._pending: dict[Path, str] = {self._text: "", self._json: ""}

    def keep_until(self, step: int) -> None:
        """Drop the lines after ``step`` (they will be written again) and a line cut short by a crash; also from the route
        traces of all ranks, of which there may have been more than now."""
        _keep_lines(self._text, lambda line: len(line.split()) == 3 and int(line.split()[0]) <= step)
        for path in (self._json, *self._folder.glob(ROUTES.format("*"))):
            _keep_lines(path, lambda line: json.loads(line)["step"] <= step)

    def write(self, entries: list[dict[str, Any]]) -> str | None:
        """Append entries, each with at least ``step`` and ``stage``, those of train and val with ``loss``; the others
        (eval) are in ``log.jsonl`` only.

        Returns why the system refused, if it did: then the lines wait in memory for the next call.
        """
        self._pending[self._text] += "".join(
            f"{e['step']} {e['stage']} {e['loss']:#.10g}\n" for e in entries if "loss" in e
        )
        self._pending[self._json] += "".join(map(json_line, entries))
        refused = None
        for path, lines in self._pending.items():
            try:
                _append(path, lines)
                self._pending[path] = ""
            except OSError as error:
                refused = f"{path} cannot be written ({error.strerror}); its lines wait for the next report"
        return refused


def _append(path: Path, lines: str) -> None:
    """All of ``lines``, or none: a full disk may have taken a part."""
    path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it during the run
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        content = memoryview(lines.encode())
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(before)
            raise


def json_line(entry: dict[str, Any]) -> str:
    """``entry`` as one line. JSON has no NaN or infinity: those become text, at any depth."""
    return json.dumps(_finite(entry)) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _keep_lines(path: Path, wanted: Callable[[bytes], bool]) -> None:
    if path.exists():
        write_atomically(path, lambda file: file.writelines(_kept_lines(path, wanted)))


def _kept_lines(path: Path, wanted: Callable[[bytes], bool]) -> Iterator[bytes]:
    """One at a time: a route trace can be larger than memory."""
    with open(path, "rb") as file:
        for line in file:
            try:
                keep = line.endswith(b"\n") and wanted(line)
            except ValueError:  # not a whole line: the process was killed while writing it
                continue
            if keep:
                yield line
