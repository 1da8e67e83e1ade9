"""The groups of every axis hold the ranks that the layout says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.distributed import ParallelLayout, ParallelState

Pools = Callable[[int], Ranks]
LAYOUTS = [
    (world, sep, ep)
    for world, sep, ep in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4))
    if world % sep == 0 and world % ep == 0
]


def _describe(world: int, sep: int, ep: int) -> dict[str, Any]:
    state = ParallelState.create(ParallelLayout(world, sep, ep), torch.device("cpu"))
    members, sums = {}, {}
    for axis in state.layout.axes:
        members[axis] = dist.get_process_group_ranks(state.groups[axis])
        assert members[axis][state.group_rank(axis)] == state.rank
        total = torch.tensor(10**state.rank)
        dist.all_reduce(total, group=state.groups[axis])
        sums[axis] = int(total)
    distinct = {id(group) for group in state.groups.values()}
    return {"rank": state.rank, "master": state.is_master, "members": members, "sums": sums, "distinct": len(distinct)}


@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
def test_every_axis_joins_the_layouts_ranks(ranks: Pools, world: int, sep: int, ep: int) -> None:
    layout = ParallelLayout(world, sep, ep)
    for rank, found in enumerate(ranks(world).run(_describe, world, sep, ep)):
        assert (found["rank"], found["master"]) == (rank, rank == 0)
        for axis in layout.axes:
            (mine,) = (group for group in layout.ranks(axis) if rank in group)
            assert found["members"][axis] == mine
            assert found["sums"][axis] == sum(10**r for r in mine)


def test_axes_with_the_same_ranks_share_a_group(ranks: Pools) -> None:
    assert ranks(4).run(_describe, 4, 1, 1)[0]["distinct"] == 2  # the world, and groups of one
    assert ranks(4).run(_describe, 4, 2, 2)[0]["distinct"] == 4  # the world, rows, columns, groups of one
    assert ranks(1).run(_describe, 1, 1, 1)[0]["distinct"] == 1


def _is_frozen() -> None:
    state = ParallelState.create(ParallelLayout(1), torch.device("cpu"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.rank = 1  # type: ignore[misc]


def test_the_state_is_frozen(ranks: Pools) -> None:
    ranks(1).run(_is_frozen)
