"""Stop signals: the first is noted, the second ends the process, copies of the first do not count; and helpers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from tinytron.utils.signals import NATIVE_CALL_SECONDS, SAME_SIGNAL_SECONDS, STOP_SIGNALS, StopRequest, interruptible

StartInterruptible = Callable[..., "subprocess.Popen[str]"]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.mark.parametrize(
    ("arrivals", "left"),
    [
        ([(TERM, 0.0)], []),
        ([(USR1, 0.0), (USR1, SAME_SIGNAL_SECONDS[USR1] * 0.9)], []),  # the launcher's copy
        ([(TERM, 0.0), (TERM, SAME_SIGNAL_SECONDS[TERM] * 1.1)], [128 + TERM]),
        ([(USR1, 0.0), (TERM, 0.1)], [128 + TERM]),  # not a copy
        ([(INT, 0.0), (INT, SAME_SIGNAL_SECONDS[TERM] * 0.5)], [128 + INT]),  # somebody hit Ctrl-C twice
    ],
    ids=["first", "copy", "second", "other", "Ctrl-C"],
)
def test_the_second_signal_leaves(
    arrivals: list[tuple[signal.Signals, float]], left: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    now = 0.0
    firsts: list[int] = []
    request = StopRequest(leave=statuses.append, now=lambda: now, first=firsts.append)
    for number, now in arrivals:  # noqa: B007  # read by the lambda
        request.take(number)
    assert (request.received, statuses, firsts) == (arrivals[0][0], left, [arrivals[0][0]])
    said = "".join(f"second {signal.Signals(status - 128).name}: leaving at once\n" for status in left)
    assert capsys.readouterr().err == said


def test_only_a_request_that_speaks_says_that_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    """One rank of a job does."""
    statuses: list[int] = []
    request = StopRequest(leave=statuses.append, speaks=False)
    request.take(USR1)
    request.take(TERM)
    assert (statuses, capsys.readouterr().err) == ([128 + TERM], "")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_are_received_while_listening_and_handlers_put_back(number: signal.Signals) -> None:
    seen: list[int] = []
    old = signal.signal(number, lambda number, _: seen.append(number))
    try:
        request = StopRequest()
        with request.listening():
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 10
            while not request.received and time.monotonic() < deadline:
                time.sleep(0.001)
        assert (request.received, seen) == (number, [])
        os.kill(os.getpid(), number)
        assert seen == [number]
        deadline = time.monotonic() + 10
        while any(t.name == "stop signals" for t in threading.enumerate()):
            assert time.monotonic() < deadline
    finally:
        signal.signal(number, old)


def test_ctrl_c_stays_ignored_where_it_is() -> None:
    """As in ``command &`` of a shell script: Ctrl-C is meant for another."""
    old = signal.signal(INT, signal.SIG_IGN)
    try:
        request = StopRequest()
        with request.listening():
            os.kill(os.getpid(), INT)
            assert signal.getsignal(INT) == signal.SIG_IGN
            assert signal.getsignal(TERM) != signal.SIG_DFL
        assert request.received == 0
    finally:
        signal.signal(INT, old)


def test_another_thread_does_not_listen() -> None:
    handlers = []

    def listen() -> None:
        with StopRequest().listening():
            handlers.extend(signal.getsignal(number) for number in STOP_SIGNALS)

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == before


def _script(text: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


IN_CPP = """
import sys
import torch.distributed as dist
from tinytron.utils.signals import StopRequest
with StopRequest().listening():
    store = dist.FileStore(sys.argv[1], 1)
    print("ready", flush=True)
    store.get("what never comes")  # in C++, as in a collective: no handler in Python runs
"""


def test_a_process_that_hangs_in_a_collective_can_be_ended(tmp_path: Path) -> None:
    process = _script(IN_CPP, tmp_path / "store")
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(TERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(USR1)
        _, stderr = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (128 + USR1, "second SIGUSR1: leaving at once\n")


HELPER = """
import os, signal, sys, time
from tinytron.utils.signals import STOP_SIGNALS, ignore_group_signals
reader, writer = os.pipe()
if not (helper := os.fork()):
    ignore_group_signals()
    os.write(writer, b"x")
    time.sleep(60)
os.read(reader, 1)
if not (stranger := os.fork()):
    for number in STOP_SIGNALS:
        os.kill(helper, number)
    os._exit(0)
os.waitpid(stranger, 0)
time.sleep(0.2)
alive = os.waitpid(helper, os.WNOHANG) == (0, 0)
os.kill(helper, signal.SIGTERM)
print(alive, os.waitpid(helper, 0)[1])
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo here")
def test_a_helper_ends_for_its_parent_only() -> None:
    stdout, stderr = _script(HELPER).communicate(timeout=30)
    assert (stdout, stderr) == ("True 0\n", "")


@pytest.fixture
def interruptible_process() -> Iterator[StartInterruptible]:
    """Starts a process that does ``work`` in the context and ``cleaning`` after a KeyboardInterrupt, then ends with 3."""
    started: list[subprocess.Popen[str]] = []

    def start(work: str, cleaning: str = "pass") -> subprocess.Popen[str]:
        code = f"""
import os, signal, time
from datetime import timedelta
import torch.distributed
from tinytron.utils.signals import interruptible

with interruptible(lambda: os.write(2, b"interrupted\\n")):
    try:
        print("up", flush=True)
        {work}
    except KeyboardInterrupt:
        {cleaning}
        os._exit(3)
"""
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(0.3)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("gap", [0.0, 0.0002, 0.001])
def test_a_copy_of_ctrl_c_does_not_interrupt_what_follows_the_first(
    gap: float, interruptible_process: StartInterruptible
) -> None:
    """A launcher passes on what the terminal has sent to its workers already."""
    process = interruptible_process("time.sleep(60)", "time.sleep(0.2)")
    process.send_signal(INT)
    time.sleep(gap)
    process.send_signal(INT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 3


def test_a_second_ctrl_c_ends_the_process_also_while_it_cleans_up(interruptible_process: StartInterruptible) -> None:
    process = interruptible_process("time.sleep(60)", "print('cleaning', flush=True); time.sleep(60)")
    process.send_signal(INT)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning\n"
    time.sleep(SAME_SIGNAL_SECONDS[INT] + 0.1)
    process.send_signal(INT)
    assert process.communicate(timeout=20) == ("", "second SIGINT: leaving at once\n")
    assert process.returncode == 130


def test_ctrl_c_ends_a_native_call_that_does_not_return(interruptible_process: StartInterruptible) -> None:
    """As torch's wait for a rank that is missing, which ignores signals for 30 minutes."""
    wait = "torch.distributed.TCPStore('127.0.0.1', 0, 1, True, timedelta(minutes=30)).wait(['never'])"
    process = interruptible_process(wait)
    began = time.monotonic()
    process.send_signal(INT)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == 130
    assert time.monotonic() - began > NATIVE_CALL_SECONDS * 0.9


def test_other_handlers_of_ctrl_c_keep_working_inside(interruptible_process: StartInterruptible) -> None:
    """As that of a launcher, which passes it on, as often as it comes."""
    inside = "signal.signal(2, lambda *_: print('mine', flush=True)); time.sleep(60)"
    process = interruptible_process(inside)
    assert process.stdout is not None
    for _ in range(2):
        process.send_signal(INT)
        assert process.stdout.readline() == "mine\n"
        time.sleep(SAME_SIGNAL_SECONDS[INT] + 0.1)
    time.sleep(NATIVE_CALL_SECONDS)
    assert process.poll() is None


def test_a_process_that_ignores_ctrl_c_is_left_as_it_is() -> None:
    old = signal.signal(INT, signal.SIG_IGN)
    try:
        with interruptible(lambda: None):
            assert signal.getsignal(INT) == signal.SIG_IGN
    finally:
        signal.signal(INT, old)
