"""The pool itself: results in order, failures and hangs named, a fresh pool afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(2, tmp_path_factory.mktemp("own"))
    yield made
    made.close(kill=True)


def _sum_of_ranks() -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def _rank_one_does(action: Callable[[], object]) -> None:
    if dist.get_rank() == 1:
        action()
    dist.barrier()


def _raise() -> None:
    raise ValueError("only on rank 1")


def _exit() -> None:
    os._exit(3)


def _sleep() -> None:
    time.sleep(60)


def test_results_come_in_rank_order_and_the_pool_is_reused(pool: Ranks) -> None:
    assert pool.run(dist.get_rank) == [0, 1]
    first = [p.pid for p in pool.processes]
    assert pool.run(_sum_of_ranks) == [1, 1]
    assert [p.pid for p in pool.processes] == first


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (_raise, "rank 1 of 2:(?s:.)*ValueError: only on rank 1"),
        pytest.param(_exit, r"ranks \[1\] of 2 died", marks=pytest.mark.slow),
        pytest.param(_sleep, r"ranks \[0, 1\] of 2 were silent for 1 s", marks=pytest.mark.slow),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_failure_is_named_and_the_next_run_has_a_fresh_pool(
    pool: Ranks, action: Callable[[], object], message: str
) -> None:
    pool.run(dist.get_rank)
    before = pool.processes
    with pytest.raises(AssertionError, match=message):
        pool.run(_rank_one_does, action, timeout=1)
    assert not any(p.is_alive() for p in before)
    assert pool.run(_sum_of_ranks) == [1, 1]
