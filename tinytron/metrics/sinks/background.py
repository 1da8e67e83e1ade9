"""Sinks in a thread, for those that may be slow: training does not wait for a network."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

from tinytron.errors import first_line
from tinytron.metrics.sinks.base import Record, RunInfo, Sink, SinkFailedError

MOST_WAITING = 1000  # reports; at the usual intervals that is hours of training
CLOSE_SECONDS = 60.0


class Background(Sink):
    """Opens and resumes ``sink`` at once, and calls it in a thread from then on; ``name`` is for errors. ``close`` waits up
    to ``close_seconds`` for what is left.

    If the sink raises an error, or falls ``most`` reports behind, the next call raises a SinkFailedError.
    """

    def __init__(self, sink: Sink, name: str, most: int = MOST_WAITING, close_seconds: float = CLOSE_SECONDS) -> None:
        self._sink, self._name, self._close_seconds = sink, name, close_seconds
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=most)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def say(self, text: str) -> None:
        self._sink.say(text)

    def open(self, run: RunInfo) -> None:
        self._sink.open(run)

    def resume(self, step: int) -> None:
        self._sink.resume(step)

    def go_back(self, step: int) -> None:
        if self._thread is None:
            self._sink.go_back(step)
        else:
            self._call(lambda: self._sink.go_back(step))

    def write(self, records: Sequence[Record]) -> None:
        self._raise_error()
        if self._closed:  # an evaluation that the user started
            try:
                self._sink.write(records)
            except Exception as error:
                self._error = error
            self._raise_error()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"logger {self._name}", daemon=True)
            self._thread.start()
        self._call(lambda: self._sink.write(records))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            self._calls.put_nowait(action)
        except queue.Full:
            self._error = RuntimeError(f"it is {self._calls.maxsize} reports behind")
            self._raise_error()

    def figure(self, step: int, name: str, image: bytes) -> None:
        if self._thread is not None and self._error is None:
            with contextlib.suppress(queue.Full):  # ``write`` says so
                self._calls.put_nowait(lambda: self._sink.figure(step, name, image))

    def fail(self, why: str) -> None:
        if self._thread is None:
            self._sink.fail(why)
        elif self._error is None:
            self._call(lambda: self._sink.fail(why))

    def close(self) -> None:
        """Finish the waiting calls, and close the sink; later records are written at once. Raises: SinkFailedError, also
        if closing takes too long."""
        self._closed = True
        if self._thread is not None:
            end = time.monotonic() + self._close_seconds
            with contextlib.suppress(queue.Full):
                self._calls.put(self._sink.close, timeout=self._close_seconds)
                self._calls.put(None, timeout=self._close_seconds)
            self._thread.join(max(0, end - time.monotonic()))
            if self._thread.is_alive():
                self._error = RuntimeError(
                    f"{self._calls.qsize()} reports are not sent after {self._close_seconds:g} s"
                )
            self._thread = None
        else:
            self._sink.close()
        self._raise_error()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if self._error is None:
                    call()
            except Exception as error:
                self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise SinkFailedError(f"the logger {self._name} stops: {first_line(self._error)}") from self._error
