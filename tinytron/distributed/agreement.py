"""Agreement: an error on one rank becomes the same error on all ranks, so that no rank waits for one that stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch.distributed as dist

from tinytron.errors import DataError, TinytronError

T = TypeVar("T")


def agree(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run ``action`` on every rank of ``group``; if it raises a ``TinytronError`` or ``OSError`` on any of them, every rank
    raises the error of the lowest such rank. Collective.

    Use it for anything that depends on a machine's files or environment. Otherwise the healthy ranks would wait in their
    next collective for the rank that stopped.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except (TinytronError, OSError) as caught:
        error = caught
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first if isinstance(first, TinytronError) else TinytronError(str(first))
    return result  # type: ignore[return-value]


def agree_slowly(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """``agree`` for an ``action`` that may take longer than a collective's timeout, such as a download. The action runs in
    a thread while the ranks tell each other every second that they are alive. Once it has failed on one rank, no rank
    waits for the actions of the others. Collective."""
    job: Future[T] = Future()

    def work() -> None:
        try:
            job.set_result(action())
        except BaseException as error:  # re-raised in the calling thread
            job.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # daemon: an abandoned action must not keep the process alive
    states = [(False, False)] * dist.get_world_size(group)
    while not (all(done for done, _ in states) or any(failed for _, failed in states)):
        wait([job], timeout=1.0)
        done = job.done()
        dist.all_gather_object(states, (done, done and job.exception() is not None), group=group)
    return agree(lambda: job.result() if job.done() else None, group)  # type: ignore[return-value]


def told_by_first(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run ``action`` on the first rank of ``group`` and return its result on every rank; an error is raised on every rank,
    as in ``agree``. Collective. Use it for choices that follow from files: other nodes may not see the newest ones yet."""
    told = [agree(lambda: action() if dist.get_rank(group) == 0 else None, group)]
    dist.broadcast_object_list(told, group=group, group_src=0)
    return told[0]  # type: ignore[return-value]


def require_same(value: object, group: dist.ProcessGroup, message: str) -> None:
    """Check that ``value`` is the same on all ranks. Collective. Raises: DataError with ``message`` on every rank."""
    values: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    if any(other != values[0] for other in values):
        raise DataError(message)
