"""Requests to stop: Ctrl-C, or SIGTERM and SIGUSR1, which schedulers such as SLURM send before they take a machine
away."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_END = b"\0"  # no signal has this number
# A signal that repeats the first one within this time is a copy that arrived by another path. The time is shorter for
# Ctrl-C, because a user who presses it twice means it.
SAME_SIGNAL_SECONDS = {signal.SIGTERM: 2.0, signal.SIGUSR1: 2.0, signal.SIGINT: 0.5}


class StopRequest:
    """Receives stop signals. ``received`` is the number of the first signal since ``listening`` (0: none). A second signal
    ends the process at once, with status 128 + its number.

    A scheduler may signal both a launcher and its workers, and the launcher passes its copy on. So the same signal within
    ``SAME_SIGNAL_SECONDS`` does not count. ``first`` is called with the first signal's number, ``leave`` ends the process,
    and ``now`` returns the time in seconds.
    """

    def __init__(
        self,
        leave: Callable[[int], object] = os._exit,
        now: Callable[[], float] = time.monotonic,
        first: Callable[[int], object] = lambda number: None,
    ) -> None:
        self.received = 0
        self._leave, self._now, self._first = leave, now, first
        self._first_at = 0.0

    def take(self, number: int) -> None:
        """Handle the arrival of signal ``number``."""
        if self.received == 0:
            self.received = number
            self._first_at = self._now()
            self._first(number)
        elif number != self.received or self._now() - self._first_at > SAME_SIGNAL_SECONDS[signal.Signals(number)]:
            print(f"second {signal.Signals(number).name}: leaving at once", file=sys.stderr, flush=True)
            self._leave(128 + number)

    @contextlib.contextmanager
    def listening(self, numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
        """Receive the signals in this context, then restore the old handlers. This works only in the main thread; in other
        threads it does nothing.

        A thread reads the signals from a socket that the interpreter's C handler writes to. A Python handler would have to
        wait for the main thread, which may be in a collective that never ends.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        numbers = heard(numbers)
        old_handlers = {number: signal.signal(number, _leave_to_the_thread) for number in numbers}
        old_writer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(reader, numbers), name="stop signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_writer)
            for number, handler in old_handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: the old handler was not installed from Python
            with writer:
                writer.send(_END)
            thread.join()  # a running thread would keep this object, and the owner of ``first``, alive

    def _read(self, reader: socket.socket, numbers: Sequence[signal.Signals]) -> None:
        with reader:
            while (byte := reader.recv(1)) != _END:
                if byte[0] in numbers:  # the socket also gets other signals that have a Python handler
                    self.take(byte[0])


def heard(numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """The signals of ``numbers`` to listen to: all, but not Ctrl-C in a process that ignores it, such as a shell's
    background job."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return [number for number in numbers if not (ignored and number == signal.SIGINT)]


def _leave_to_the_thread(number: int, frame: object) -> None:
    """No-op handler: CPython writes to the wakeup socket only for signals that have a Python handler."""


def ignore_group_signals(*_: object) -> None:
    """Make a helper process, such as a data loader worker, ignore stop signals that do not come from its parent.

    A signal to a whole job also reaches helpers, but a data loader needs its workers until the next checkpoint is saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_wait_for_the_parents_signal, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
