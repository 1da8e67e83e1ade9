"""Agreement on errors."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.distributed.agreement import agree, agree_slowly, require_same
from tinytron.errors import ConfigError, DataError, TinytronError

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _caught(failing: dict[int, Exception]) -> tuple[str, str]:
    def action() -> str:
        if error := failing.get(dist.get_rank()):
            raise error
        return f"result {dist.get_rank()}"

    try:
        return "result", agree(action, _world())
    except TinytronError as error:
        return type(error).__name__, str(error)


@WORLDS
def test_together_returns_every_ranks_own_result(ranks: Pools, world: int) -> None:
    assert ranks(world).run(_caught, {}) == [("result", f"result {rank}") for rank in range(world)]


@WORLDS
@pytest.mark.parametrize("rank", [0, -1])
def test_together_raises_one_ranks_error_on_all(ranks: Pools, world: int, rank: int) -> None:
    failing = {rank % world: DataError("no shards")}
    assert ranks(world).run(_caught, failing) == [("DataError", "no shards")] * world


def test_together_raises_the_error_of_the_lowest_rank(ranks: Pools) -> None:
    failing = {3: DataError("of three"), 1: ConfigError("of one"), 2: ConfigError("of two")}
    assert ranks(4).run(_caught, failing) == [("ConfigError", "of one")] * 4


def test_together_turns_a_disks_error_into_a_users(ranks: Pools) -> None:
    failing = {1: OSError(errno.ENOSPC, "No space left on device", "/data/00001_model.pt")}
    message = "[Errno 28] No space left on device: '/data/00001_model.pt'"
    assert ranks(2).run(_caught, failing) == [("TinytronError", message)] * 2


def _slow_on_rank_1(fail: bool) -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))

    def action() -> str:
        if dist.get_rank() == 1:
            time.sleep(4)
            if fail:
                raise DataError("no shards")
        return f"result {dist.get_rank()}"

    try:
        return agree_slowly(action, group)
    except TinytronError as error:
        return str(error)


@pytest.mark.parametrize("fail", [False, True])
def test_together_long_outlives_the_timeout_of_collectives(ranks: Pools, fail: bool) -> None:
    assert ranks(2).run(_slow_on_rank_1, fail) == (["no shards"] * 2 if fail else ["result 0", "result 1"])


def _fail_on_rank_1() -> str:
    """Rank 0 would work for longer than a test may take."""

    def action() -> None:
        if dist.get_rank() == 0:
            time.sleep(30)
        raise ConfigError("HF_MAX_SAMPLES is wrong here")

    try:
        agree_slowly(action, _world())
    except TinytronError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_together_long_does_not_wait_once_a_rank_has_failed(ranks: Pools) -> None:
    start = time.monotonic()
    assert ranks(2).run(_fail_on_rank_1) == ["ConfigError: HF_MAX_SAMPLES is wrong here"] * 2
    assert time.monotonic() - start < 20


def _same(alike: bool) -> str:
    try:
        require_same(("shard", 1 if alike else dist.get_rank()), _world(), "the nodes differ; copy the shards")
    except DataError as error:
        return str(error)
    return "the same"


@WORLDS
def test_values_that_differ_between_ranks_are_an_error_on_all(ranks: Pools, world: int) -> None:
    assert ranks(world).run(_same, True) == ["the same"] * world
    if world > 1:
        assert ranks(world).run(_same, False) == ["the nodes differ; copy the shards"] * world


def _subgroup_agreement() -> str:
    """Only the ranks of the group take part."""
    pair = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return "outside"

    def action() -> None:
        if dist.get_rank() == 1:
            raise ConfigError("rank 1 of the pair")

    with pytest.raises(ConfigError, match="rank 1 of the pair"):
        agree(action, pair)
    return "agreed"


def test_together_concerns_its_group_only(ranks: Pools) -> None:
    assert ranks(4).run(_subgroup_agreement) == ["agreed", "agreed", "outside", "outside"]
