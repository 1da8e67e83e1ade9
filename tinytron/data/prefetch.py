"""A thread that computes items ahead of their use and keeps their order."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The same items in the same order; a thread computes up to ``depth`` of them ahead of the one in use (0: no thread,
    each item is computed on request).

    An exception raised while computing an item is raised here in that item's place. Closing the iterator ends the thread.
    """
    if depth <= 0:
        yield from items
        return
    ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    free = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        try:
            source = iter(items)
            while free.acquire() and not closed.is_set():
                ready.put((next(source), None))
        except BaseException as error:  # includes StopIteration; the consumer raises it
            ready.put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        free.release()
        thread.join(
            timeout=5
        )  # a read from a dead disk may never return; a daemon thread does not keep the process alive
