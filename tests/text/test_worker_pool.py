"""Workers: results in order, errors in their turn, and no worker's end goes unnoticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.helpers.corpus import workers as live_workers
from tinytron.errors import ConfigError, DataError
from tinytron.text.worker_pool import ROOM, WorkerPool
from tinytron.utils.signals import STOP_SIGNALS


@dataclass(frozen=True)
class Square:
    """The square of a number, later for small ones; ``bad`` numbers fail."""

    bad: int = -1
    deadly: int = -1

    def __call__(self, number: int) -> int:
        if number == self.bad:
            raise DataError(f"number {number} is bad")
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number * number


def _squares(work: Square, workers: int, tasks: Iterator[int], got: list[int]) -> None:
    with WorkerPool(work, workers) as pool:
        for task, result in pool.map(tasks, lambda: False):
            assert result == task * task
            got.append(task)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    got: list[int] = []
    _squares(Square(), workers, iter(range(30)), got)
    assert got == list(range(30))
    _squares(Square(), workers, iter(()), got)
    assert not live_workers()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_turn(workers: int) -> None:
    got: list[int] = []
    with pytest.raises(DataError, match=r"^number 8 is bad$"):
        _squares(Square(bad=8), workers, iter(range(100)), got)
    assert got == list(range(8))
    assert not live_workers()


@pytest.mark.parametrize("workers", [0, 2])
def test_so_is_an_error_of_the_tasks(workers: int) -> None:
    def tasks() -> Iterator[int]:
        yield from range(5)
        raise ConfigError("no more")

    got: list[int] = []
    with pytest.raises(ConfigError, match="no more"):
        _squares(Square(), workers, tasks(), got)
    assert got == list(range(5))


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*not all arguments"):
        _squares(Square(), 1, iter(["x"]), [])  # type: ignore[list-item]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.sample(1)
def test_a_killed_worker_ends_it(workers: int) -> None:
    got: list[int] = []
    message = r"worker process \d+ was killed \(exit code -9\), .*; run again with a smaller --num_proc or a smaller"
    with pytest.raises(DataError, match=message):
        _squares(Square(deadly=6), workers, iter(range(1000)), got)
    assert got == list(range(6))


def test_few_tasks_are_begun_before_results_are_used() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with WorkerPool(Square(), 2) as pool:
        results = pool.map(tasks(), lambda: False)
        next(results)
        time.sleep(0.3)
        assert taken <= 2 * ROOM + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_it_stops_when_asked(workers: int) -> None:
    got: list[int] = []
    with WorkerPool(Square(), workers) as pool:
        for task, _ in pool.map(iter(range(1000)), lambda: 5 in got):
            got.append(task)
    assert got == list(range(6))
    assert not live_workers()


def _signalled(number: int) -> None:
    server = forkserver._forkserver  # type: ignore[attr-defined]
    ensure_running = server.ensure_running

    def ensured_and_hit() -> None:
        known = server._forkserver_pid
        ensure_running()
        if known is None:
            os.kill(server._forkserver_pid, number)  # while it loads its modules

    server.ensure_running = ensured_and_hit
    forkserver.ensure_running = ensured_and_hit
    got: list[int] = []
    _squares(Square(), 2, iter(range(9)), got)
    assert got == list(range(9))


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.sample(1)
def test_a_signal_to_the_whole_job_leaves_the_server_of_workers_alone(number: signal.Signals) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_signalled, args=(number,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0


def _orphan(folder: str) -> None:
    with WorkerPool(Square(), 2) as pool:
        next(pool.map(iter(range(10)), lambda: False))
        pids = [process.pid for process in live_workers()]
        Path(folder, "pids").write_text(" ".join(map(str, pids)))
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_do_not_outlive_the_process_they_work_for(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_orphan, args=(str(tmp_path),))
    process.start()
    process.join()
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
