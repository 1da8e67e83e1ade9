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
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C
_END = b"\0"  # no signal has this number
# A signal that repeats the first one within this time is a copy that arrived by another path. The time is shorter for
# Ctrl-C, because a user who presses it twice means it.
SAME_SIGNAL_SECONDS = {signal.SIGTERM: 2.0, signal.SIGUSR1: 2.0, signal.SIGINT: 0.5}
NATIVE_CALL_SECONDS = 3.0  # for a native call to return after Ctrl-C


class StopRequest:
    """Receives stop signals. ``received`` is the number of the first signal since ``listening`` (0: none). A second signal
    ends the process at once, with status 128 + its number.

    A scheduler may signal both a launcher and its workers, and the launcher passes its copy on. So the same signal within
    ``SAME_SIGNAL_SECONDS`` does not count. ``first`` is called with the first signal's number, ``leave`` ends the process,
    and ``now`` returns the time in seconds. Unless it ``speaks``, another process of the same job says that it leaves.
    """

    def __init__(
        self,
        leave: Callable[[int], object] = os._exit,
        now: Callable[[], float] = time.monotonic,
        first: Callable[[int], object] = lambda number: None,
        speaks: bool = True,
    ) -> None:
        self.received = 0
        self._announced = False
        self._leave, self._now, self._first, self._speaks = leave, now, first, speaks
        self._first_at = 0.0

    def take(self, number: int) -> None:
        """Handle the arrival of signal ``number``."""
        if self.received == 0 or self._announced:
            self._announced = False
            self.received = number
            self._first_at = self._now()
            self._first(number)
        elif number != self.received or self._now() - self._first_at > SAME_SIGNAL_SECONDS[signal.Signals(number)]:
            if self._speaks:
                print(f"second {signal.Signals(number).name}: leaving at once", file=sys.stderr, flush=True)
            self._leave(128 + number)

    def announce(self, number: int) -> None:
        """Stop as after signal ``number``, which has not come yet: when it comes, it is the first one."""
        if self.received == 0:
            self._announced = True
            self.received = number

    @contextlib.contextmanager
    def listening(
        self,
        numbers: Sequence[signal.Signals] = STOP_SIGNALS,
        handler: Callable[[int, FrameType | None], object] = lambda number, frame: None,
    ) -> Iterator[None]:
        """Receive the signals in this context, then restore the old handlers. This works only in the main thread; in other
        threads it does nothing. Python also calls ``handler``, in the main thread.

        A thread reads the signals from a socket. CPython writes to it only for signals that have a Python handler, and that
        handler has to wait for the main thread, which may be in a collective that never ends.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        numbers = heard(numbers)
        old_handlers = {number: signal.signal(number, handler) for number in numbers}
        old_writer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(reader, numbers), name="stop signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_writer)
            for number, old in old_handlers.items():
                signal.signal(number, old or signal.SIG_DFL)  # None: the old handler was not installed from Python
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


class _Interruption(StopRequest):
    """Ctrl-C as a KeyboardInterrupt, once. While another handler is in place, such as a launcher's, it does nothing."""

    def __init__(self, say: Callable[[], object]) -> None:
        super().__init__(first=self._await_the_main_thread)
        self._say, self._raised = say, False

    def take(self, number: int) -> None:
        if signal.getsignal(signal.SIGINT) == self.raise_once:
            super().take(number)

    def raise_once(self, number: int, frame: object) -> None:
        """The handler, which Python calls in the main thread. Raises: KeyboardInterrupt the first time."""
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _await_the_main_thread(self, number: int) -> None:
        timer = threading.Timer(NATIVE_CALL_SECONDS, self._leave_if_stuck)
        timer.daemon = True
        timer.start()

    def _leave_if_stuck(self) -> None:
        if not self._raised:
            self._say()
            self._leave(INTERRUPTED)


@contextlib.contextmanager
def interruptible(say: Callable[[], object]) -> Iterator[None]:
    """Around a command: the first Ctrl-C raises KeyboardInterrupt, and a second one ends the process at once.

    A copy of the first one within ``SAME_SIGNAL_SECONDS`` does not count: a terminal signals a launcher and its workers
    alike, and the launcher's copy would interrupt the cleanup and end in a traceback. If the main thread does not return
    from a native call within ``NATIVE_CALL_SECONDS``, ``say`` is called and the process ends: torch waits 30 minutes for a
    missing rank, and Python raises nothing meanwhile. Handlers other than Python's own stay in place.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interruption = _Interruption(say)
    with interruption.listening([signal.SIGINT], interruption.raise_once):
        yield


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
