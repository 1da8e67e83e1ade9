"""A thread that works ahead: same items, same order, same errors, and it ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from tinytron.data.prefetch import prefetched
from tinytron.errors import DataError

DEPTHS = pytest.mark.parametrize("depth", [0, 1, 2, 7])


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@DEPTHS
def test_items_come_in_their_order(depth: int) -> None:
    assert list(prefetched(range(100), depth)) == list(range(100))
    assert list(prefetched([], depth)) == []
    assert not running()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_are_made_ahead(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    ready = prefetched(items(), depth)
    for used in range(1, 5):
        next(ready)
        deadline = time.monotonic() + 5
        while len(made) < used + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == used + depth  # the item in use is none of those that are ready
    ready.close()


@DEPTHS
def test_an_error_is_raised_where_its_item_would_be(depth: int) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise DataError("a.bin is damaged")

    ready = prefetched(items(), depth)
    assert [next(ready) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"a\.bin is damaged"):
        next(ready)
    assert not running()


@DEPTHS
def test_closing_ends_the_thread(depth: int) -> None:
    ready = prefetched(itertools.count(), depth)
    assert [next(ready), next(ready)] == [0, 1]
    assert len(running()) == (depth > 0)
    ready.close()
    assert not running()


def test_dropping_ends_the_thread_too() -> None:
    for item in prefetched(itertools.count(), 2):
        if item == 3:
            break
    assert not running()
