"""A pool of processes that work on a stream of tasks and return the results in the order of the tasks.

Each process has a pipe and, in the parent, a thread that feeds it, so that it has work while results are being used. The
pipe also links their lifetimes: a worker exits when its pipe closes, and a pipe that closes under the thread means that the
worker died.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from tinytron.errors import DataError, TinytronError
from tinytron.utils.signals import STOP_SIGNALS

Task = TypeVar("Task")
Result = TypeVar("Result")
WORKER = "token worker"  # the name of every process
ROOM = 2  # tasks per worker that are in progress, or done but not yet used


class WorkerPool(Generic[Task, Result]):
    """``count`` processes that call ``work``, which is sent to each once; with a count of 0 this process calls it.

    A context manager: it kills the processes on exit.
    """

    def __init__(self, work: Callable[[Task], Result], count: int) -> None:
        self._work, self._count = work, count
        self._closed = False
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> WorkerPool[Task, Result]:
        # Forked from a server without threads, because forking this process, which has threads, may hang.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        if self._count:
            start_deaf_server()
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=WORKER, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def map(self, tasks: Iterator[Task], stopped: Callable[[], bool]) -> Iterator[tuple[Task, Result]]:
        """Every task and its result, in order; ends early once ``stopped`` returns true. Raises: what ``tasks`` or, when
        its turn comes, ``work`` raises; DataError if a worker is killed."""
        if not self._count:
            for task in tasks:
                if stopped():
                    return
                yield task, self._work(task)
            return
        feed: _Feed[Task, Result] = _Feed(tasks, ROOM * self._count)
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            threading.Thread(target=self._attend, args=(feed, process, pipe), daemon=True).start()
        try:
            while not stopped():
                try:
                    entry = feed.ordered.get(timeout=0.2)
                except queue.Empty:
                    continue
                if entry is None:
                    return
                task, future = entry
                while not wait([future], timeout=0.2).done and not stopped():
                    pass
                if stopped():
                    return
                result = future.result()
                feed.room.release()
                yield task, result
        finally:
            feed.end()

    def _attend(self, feed: _Feed[Task, Result], process: Any, pipe: Connection) -> None:
        """Send ``process`` one task after another."""
        with contextlib.suppress(OSError):  # the worker died; its first answer reports that
            pipe.send(self._work)
        while (entry := feed.next()) is not None:
            task, future = entry
            try:
                pipe.send(task)
                failed, answer = pipe.recv()
            except (EOFError, OSError):
                process.join(timeout=5)
                what = f"worker process {process.pid} was killed (exit code {process.exitcode}), perhaps out of memory"
                future.set_exception(DataError(f"{what}; run again with a smaller --num_proc or a smaller --chunksize"))
                return
            except BaseException as error:  # the task cannot be sent; raise where the result is used
                future.set_exception(error)
                return
            if failed:
                future.set_exception(answer)
            else:
                future.set_result(answer)


def start_deaf_server() -> None:
    """Start the server that the workers are forked from with stop signals blocked, in the server and so in the workers.

    Such a signal reaches all processes of a job, and the main process decides what to do. Without blocking, it ends a
    server that is still loading its modules, and starting the next worker raises ``EOFError``.
    """
    resource_tracker.ensure_running()  # before blocking, because starting it would unblock two of the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Feed(Generic[Task, Result]):
    """Tasks for threads: read one by one while there is room, each with a place in the order of results."""

    def __init__(self, tasks: Iterator[Task], room: int) -> None:
        self.ordered: queue.Queue[tuple[Any, Future[Any]] | None] = queue.Queue()
        self.room = threading.Semaphore(room)
        self._tasks, self._lock, self._ended = tasks, threading.Lock(), False

    def next(self) -> tuple[Task, Future[Result]] | None:
        """The next task, and the future for its result; ``None`` after the last."""
        with self._lock:
            self.room.acquire()  # the other threads wait for the lock
            if self._ended:
                self.room.release()
                return None
            future: Future[Result] = Future()
            try:
                task = next(self._tasks)
            except StopIteration:
                self._ended = True
                self.ordered.put(None)
            except BaseException as error:  # raised where results are used, when its turn comes
                self._ended = True
                future.set_exception(error)
                self.ordered.put((None, future))
            else:
                self.ordered.put((task, future))
                return task, future
            self.room.release()
            return None

    def end(self) -> None:
        """No more tasks: release all threads."""
        self._ended = True
        self.room.release()


def _serve(pipe: Connection) -> None:
    """A worker process, which runs until the pipe closes."""
    # One thread per worker. putenv, because native libraries (not Python) read these.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    os.putenv("RAYON_NUM_THREADS", "1")
    with contextlib.suppress(EOFError, OSError):
        work = pipe.recv()
        while True:
            pipe.send(_answer(work, pipe.recv()))


def _answer(work: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    try:
        return False, work(task)
    except TinytronError as error:
        return True, type(error)(str(error))  # without its cause, which may not be picklable
    except BaseException:
        return True, RuntimeError(traceback.format_exc())
