"""A watchdog thread that writes down all stacks when a run makes no progress, to show what it is waiting for."""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import tinytron

_PACKAGE = str(Path(tinytron.__file__).parent)


class Watchdog:
    """Reports, once per stall, that no step was completed for ``seconds``: it appends all Python stacks of this process to
    ``path`` and prints one line to stderr. Training continues if the step completes after all.

    The first ``beat`` arms it (the first step may compile for minutes), and ``paused`` time does not count. It needs the
    interpreter, so it is silent while C code holds the GIL. ``seconds`` 0: off. ``now`` returns the time in seconds, and
    ``more`` may write more and returns a clause about it.
    """

    def __init__(
        self,
        seconds: float,
        path: Path,
        rank: int,
        now: Callable[[], float] = time.monotonic,
        more: Callable[[], str] = str,
    ) -> None:
        self.seconds, self.path, self.rank, self._now, self._more = seconds, path, rank, now, more
        self._lock = threading.Lock()
        self._deadline = float("inf")
        self._step, self._pauses = 0, 0

    def beat(self, step: int) -> None:
        """Record that step ``step`` is complete, and set the next deadline."""
        with self._lock:
            self._step = step
            self._deadline = self._now() + self.seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if self._deadline < float("inf"):  # armed, and not reported yet
                    self._deadline = self._now() + self.seconds

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which the calling thread is watched."""
        if self.seconds == 0:
            yield
            return
        done = threading.Event()
        caller = threading.get_ident()

        def watch() -> None:
            while not done.wait(min(1.0, self.seconds / 10)):
                self.look(caller)

        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            self._deadline = float("inf")

    def look(self, thread: int) -> None:
        """Report if the deadline has passed; ``thread`` is the id of the training thread."""
        with self._lock:
            overdue = self._now() - self._deadline
            if overdue < 0 or self._pauses:
                return
            self._deadline = float("inf")  # report once per stall: the next beat arms it again
            step = self._step
        place = locate_frame(sys._current_frames().get(thread))
        text = f"rank {self.rank}: no step completed for {self.seconds + overdue:.1f} s, after step {step}; {place}"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                print(text, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            text += f"; stacks: {self.path}"
        except OSError as error:
            text += f"; stacks could not be written ({error})"
        text += self._more()
        sys.stderr.write(text + "\n")  # a single write, because other ranks write, too
        sys.stderr.flush()


def locate_frame(frame: FrameType | None) -> str:
    """A clause that names the collective in which ``frame``, a thread's innermost frame, is waiting, and the innermost line
    of Tinytron."""
    collective = None
    while frame is not None:
        path, line = frame.f_code.co_filename, frame.f_lineno
        if path.startswith(_PACKAGE):
            text = linecache.getline(path, line)
            if collective is None and ".wait(" in text:  # Work.wait is C++ and has no Python frame
                collective = "Work.wait"
            doing = f"waits in {collective}, called at" if collective else "is at"
            return f"{doing} tinytron{path.removeprefix(_PACKAGE)}:{line} ({frame.f_code.co_name})"
        if collective is None and "/torch/distributed/" in path:
            collective = frame.f_code.co_name
        frame = frame.f_back
    return "is outside of Tinytron" + (f", in {collective}" if collective else "")
