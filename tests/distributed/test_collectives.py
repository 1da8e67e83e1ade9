"""Sums over ranks and agreement on errors."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.distributed.collectives import (
    SummedExchange,
    all_to_all,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    sum_over,
    together,
    together_long,
)
from tinytron.errors import ConfigError, DataError, TinytronError

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _sum_over() -> None:
    world = dist.get_world_size()
    mine = torch.full((3,), float(dist.get_rank() + 1))
    assert sum_over(mine, _world()) is mine
    assert mine.tolist() == [world * (world + 1) / 2] * 3


@WORLDS
def test_sum_over_is_in_place(ranks: Pools, world: int) -> None:
    ranks(world).run(_sum_over)


def _scatter_and_gather(wire: torch.dtype | None) -> None:
    """A reduce-scatter into the own range of its input, and an all-gather in place, as flat buffers do them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(4.0 * world) * (rank + 1)
    expected = torch.arange(4.0 * world) * world * (world + 1) / 2
    own = whole[4 * rank : 4 * rank + 4]
    if wire is None:
        start_reduce_scatter(own, whole, _world()).wait()
    else:
        SummedExchange(own, whole, _world(), wire).start().wait()
    assert torch.equal(own, expected[4 * rank : 4 * rank + 4])
    start_all_gather(whole, own, _world()).wait()
    assert torch.equal(whole, expected)


@WORLDS
@pytest.mark.parametrize("wire", [None, torch.float32, torch.bfloat16])
def test_reduce_scatter_then_all_gather_is_the_sum_everywhere(
    ranks: Pools, world: int, wire: torch.dtype | None
) -> None:
    ranks(world).run(_scatter_and_gather, wire)  # all values and sums are exact in bf16


def _several_in_flight() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    wholes = [torch.full((2 * world,), 10.0**i * (rank + 1)) for i in range(4)]
    works = [
        start_all_reduce(whole, _world())
        if i % 2
        else SummedExchange(whole[2 * rank : 2 * rank + 2], whole, _world(), whole.dtype).start()
        for i, whole in enumerate(wholes)
    ]
    for work in reversed(works):
        work.wait()
    for i, whole in enumerate(wholes):
        part = whole if i % 2 else whole[2 * rank : 2 * rank + 2]
        assert torch.equal(part, torch.full_like(part, 10.0**i * world * (world + 1) / 2))


@WORLDS
def test_exchanges_in_flight_do_not_mix(ranks: Pools, world: int) -> None:
    ranks(world).run(_several_in_flight)


def _bf16_wire() -> None:
    """Peers' parts are rounded to bf16 once: 1 + 2^-9 is 1. Sums and the own part are not: 4 + 2^-7 is no bf16 number."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for values, expected in (([1 + 2.0**-9] * 4, 4 + 2.0**-9), ([1 + 2.0**-7, 1.0, 1.0, 1.0], 4 + 2.0**-7)):
        whole = torch.full((world,), values[rank])
        own = whole[rank : rank + 1]
        SummedExchange(own, whole, _world(), torch.bfloat16).start().wait()
        assert own.tolist() == [expected]


def test_a_bf16_wire_rounds_what_is_sent_and_not_the_sum(ranks: Pools) -> None:
    ranks(4).run(_bf16_wire)


def _exchange(uneven: bool) -> None:
    """Row r -> rank: its content says where it comes from and goes to. The adjoint: <A x, y> = <x, A' y>."""
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = [[(r + 2 * to) % 3 if uneven else 2 for to in range(world)] for r in range(world)]  # some are zero
    send, recv = counts[rank], [row[rank] for row in counts]
    rows = torch.tensor([[100.0 * rank + to, i] for to in range(world) for i in range(send[to])]).view(-1, 2)
    rows.requires_grad_()
    splits = (send, recv) if uneven else (None, None)
    out = all_to_all(rows, _world(), *splits)
    expected = [[100.0 * r + rank, i] for r in range(world) for i in range(recv[r])]
    assert out.tolist() == expected
    weight = torch.arange(out.numel(), dtype=torch.float32).view_as(out) + 1000 * rank
    out.backward(weight)
    assert rows.grad is not None
    both = torch.stack([(out.detach() * weight).sum(), (rows.detach() * rows.grad).sum()])
    dist.all_reduce(both)
    torch.testing.assert_close(both[0], both[1])
    there = all_to_all(all_to_all(rows, _world(), *splits), _world(), *reversed(splits))
    assert torch.equal(there, rows)


@WORLDS
@pytest.mark.parametrize("uneven", [True, False])
def test_all_to_all_delivers_rows_and_its_backward_is_the_adjoint(ranks: Pools, world: int, uneven: bool) -> None:
    ranks(world).run(_exchange, uneven)


def _caught(failing: dict[int, Exception]) -> tuple[str, str]:
    def action() -> str:
        if error := failing.get(dist.get_rank()):
            raise error
        return f"result {dist.get_rank()}"

    try:
        return "result", together(action, _world())
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
        return together_long(action, group)
    except TinytronError as error:
        return str(error)


@pytest.mark.parametrize("fail", [False, True])
def test_together_long_outlives_the_timeout_of_collectives(ranks: Pools, fail: bool) -> None:
    assert ranks(2).run(_slow_on_rank_1, fail) == (["no shards"] * 2 if fail else ["result 0", "result 1"])


def _subgroup_agreement() -> str:
    """Only the ranks of the group take part."""
    pair = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return "outside"

    def action() -> None:
        if dist.get_rank() == 1:
            raise ConfigError("rank 1 of the pair")

    with pytest.raises(ConfigError, match="rank 1 of the pair"):
        together(action, pair)
    return "agreed"


def test_together_concerns_its_group_only(ranks: Pools) -> None:
    assert ranks(4).run(_subgroup_agreement) == ["agreed", "agreed", "outside", "outside"]
