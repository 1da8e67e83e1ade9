"""Being asked to stop: by Ctrl-C, or by SIGTERM and SIGUSR1, which schedulers like SLURM send before they take a machine
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
# Within this time a copy of the first signal is the same one, on another way; somebody who hits Ctrl-C twice means it.
SAME_SIGNAL_SECONDS = {signal.SIGTERM: 2.0, signal.SIGUSR1: 2.0, signal.SIGINT: 0.5}
NATIVE_CALL_SECONDS = 3.0  # for a native call to return after Ctrl-C


class StopRequest:
    """The first stop signal that this process got since ``listening``, in ``received`` (0: none); a second one ends the
    process at once, with status 128 + its number.

    A scheduler may signal a launcher and its workers alike, and the launcher passes its copy on: the same signal again
    within ``SAME_SIGNAL_SECONDS`` does not count. ``first`` is called with the first one; ``leave`` ends the process,
    ``now`` is the time in seconds.
    """

    def __init__(
        self,
        leave: Callable[[int], object] = os._exit,
        now: Callable[[], float] = time.monotonic,
        first: Callable[[int], object] = lambda number: None,
    ) -> None:
        self.received = 0
        self._leave, self._now, self._first, self._first_at = leave, now, first, 0.0

    def take(self, number: int) -> None:
        """Note that signal ``number`` arrived."""
        if self.received == 0:
            self.received, self._first_at = number, self._now()
            self._first(number)
        elif number != self.received or self._now() - self._first_at > SAME_SIGNAL_SECONDS[signal.Signals(number)]:
            print(f"second {signal.Signals(number).name}: leaving at once", file=sys.stderr, flush=True)
            self._leave(128 + number)

    @contextlib.contextmanager
    def listening(
        self,
        numbers: Sequence[signal.Signals] = STOP_SIGNALS,
        handler: Callable[[int, FrameType | None], object] = lambda number, frame: None,
    ) -> Iterator[None]:
        """Receive the signals in this context, then put the old handlers back. Only a main thread may; elsewhere this
        does nothing. Python also calls ``handler``, in the main thread.

        A thread reads them, through a socket that the interpreter's C handler writes to. The handler in Python, without
        which nothing is written, has to wait for the main thread, which may sit in a collective that never ends.
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
                signal.signal(number, old or signal.SIG_DFL)  # None: one that was not made in Python
            with writer:
                writer.send(_END)
            thread.join()  # a thread that runs keeps this object, and the owner of ``first``, alive

    def _read(self, reader: socket.socket, numbers: Sequence[signal.Signals]) -> None:
        with reader:
            while (byte := reader.recv(1)) != _END:
                if byte[0] in numbers:  # others with a handler in Python are written too
                    self.take(byte[0])


def heard(numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """Those of ``numbers`` to listen to: not Ctrl-C in a process that ignores it, as a shell starts what ends in ``&``."""
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
    alike, and the launcher's copy would interrupt what cleans up, and end in a traceback. A main thread that does not come
    back from a native call ends the process after ``NATIVE_CALL_SECONDS``, with what ``say`` prints: torch waits 30 minutes
    for a rank that is missing, and Python raises nothing meanwhile. Other handlers than Python's own stay in place.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interruption = _Interruption(say)
    with interruption.listening([signal.SIGINT], interruption.raise_once):
        yield


def ignore_group_signals(*_: object) -> None:
    """In a helper process, such as that of a data loader: let the process it works for decide when to stop.

    A signal to a whole job reaches helpers too; a loader without its processes could not go on to the next checkpoint.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: nothing tells who sent a signal
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_wait_for_the_parents_signal, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
