"""Figures of a run: drawn in a thread, kept in the run's folder, and shown by the loggers that can."""

from __future__ import annotations

import io
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from tinytron.errors import first_line
from tinytron.metrics.sinks import Record, RunInfo, Sink, SinkFailedError
from tinytron.utils.training import write_atomically

FOLDER = "plots"
MOST_WAITING = 8
Figures = Mapping[str, Any]  # matplotlib figures by name


class Plotter(Sink):
    """Calls functions that make figures, one after another in a thread, and gives every figure as a PNG image to ``show``
    (step, name, content). With ``save`` it is also kept as ``plots/<step>/<name>.png``.

    Figures are left out while ``MOST_WAITING`` calls wait. An error ends the plots, not the run.
    """

    def __init__(self, show: Callable[[int, str, bytes], None], *, save: bool) -> None:
        self._show, self._save = show, save
        self._calls: queue.Queue[tuple[int, Callable[[], Figures]] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def open(self, run: RunInfo) -> None:
        self._folder = run.folder / FOLDER

    def submit(self, step: int, make: Callable[[], Figures]) -> None:
        """Make the figures of ``step`` soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="plots", daemon=True)
            self._thread.start()
        if self._error is None and not self._calls.full():
            self._calls.put((step, make))

    def write(self, records: Sequence[Record]) -> None:
        """Raises: SinkFailedError once a figure could not be made."""
        self._raise_error()

    def close(self) -> None:
        """Wait for the figures that are still to be made."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            text = f"{type(self._error).__name__}: {first_line(self._error)}"
            raise SinkFailedError(f"plot() failed and is not called again ({text})") from self._error

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    self._make(*call)
                except Exception as error:  # raised by the user's function
                    self._error = error

    def _make(self, step: int, make: Callable[[], Figures]) -> None:
        for name, figure in make().items():
            image = io.BytesIO()
            figure.savefig(image, format="png", bbox_inches="tight")
            content = image.getvalue()
            if self._save:
                file = self._folder / f"{step:05d}" / f"{name.replace('/', '_')}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, partial(_write, content))
            self._show(step, name, content)
            if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
                pyplot.close(figure)  # pyplot keeps its figures otherwise


def _write(content: bytes, out: BinaryIO) -> None:
    out.write(content)
