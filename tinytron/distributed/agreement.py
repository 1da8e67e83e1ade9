"""Agreement: an error on one rank becomes the same error on all, so that no rank waits for one that stopped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch.distributed as dist

from tinytron.errors import TinytronError

T = TypeVar("T")


def together(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run ``action`` on every rank of ``group``; if it raises a ``TinytronError`` or ``OSError`` anywhere, every rank
    raises the error of the lowest such rank. Collective.

    For whatever depends on a machine's files or environment: without it the healthy ranks would wait in their next
    collective for the one that stopped.
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


def together_long(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """``together`` for an ``action`` that may take longer than a collective's timeout, such as a download: it runs in a
    thread, while the ranks tell each other every second that they are alive."""
    with ThreadPoolExecutor(1) as pool:
        job, all_done = pool.submit(action), [False]
        while not all(all_done):
            wait([job], timeout=1.0)
            all_done = [False] * dist.get_world_size(group)
            dist.all_gather_object(all_done, job.done(), group=group)
    return together(job.result, group)
