"""Sums and gathers over ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.distributed.collectives import (
    SummedExchange,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    sum_over,
)

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
