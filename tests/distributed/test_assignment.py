"""``ranks_map``, ``num_parts`` and ``verbose``: what earlier callers pass to the optimizer wrapper."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_zero1 import Net, sgd
from tests.helpers.ranks import Ranks
from tinytron.distributed import DistributedOptimizer, ParallelLayout, ParallelState
from tinytron.errors import ConfigError

Pools = Callable[[int], Ranks]


def _accepts() -> None:
    world = dist.get_world_size()
    for ranks_map in (None, list(range(world)), {i: i for i in range(world)}):
        DistributedOptimizer(sgd(Net()), None, ranks_map=ranks_map, num_parts=world)
    state = ParallelState.create(ParallelLayout(world, sep=2), torch.device("cpu"))  # dp groups [0, 2] and [1, 3]
    for accepted in (state.layout.group_of(state.rank, "dp"), [0, 1]):
        DistributedOptimizer(sgd(Net()), state.groups["dp"], accepted, 2)


def test_the_only_possible_assignment_is_accepted(ranks: Pools) -> None:
    ranks(4).run(_accepts)


def _refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistributedOptimizer(sgd(Net()), None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 3}, r"num_parts 3 must be the size of process_group, .*; use 2, or leave it out"),
        (
            {"ranks_map": [1, 0]},
            r"ranks_map \[1, 0\] must give part i to the i-th rank .*; use \[0, 1\], or leave it out",
        ),
        ({"ranks_map": {0: 0}}, r"ranks_map \{0: 0\} must give part i to the i-th rank"),
    ],
)
def test_another_assignment_is_refused(ranks: Pools, options: dict[str, Any], message: str) -> None:
    ranks(2).run(_refuses, options, message)


def _printed(shard: bool) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        optimizer = DistributedOptimizer(sgd(Net()), None, verbose=True, shard=shard, bucket_size_mb=64.0)
        assert not out.getvalue()  # the buffers do not exist yet
        optimizer.prepare()
    return out.getvalue()


def test_verbose_prints_what_each_rank_owns(ranks: Pools) -> None:
    """1 + 1001 + 1000 + 1073 elements from the last tensor to the first, and padding, in two equal parts."""
    first, second = ranks(2).run(_printed, True)
    half = -(-3075 // 256) * 128
    assert first.splitlines() == [
        "optimizer states by rank:",
        f"  part 0 on rank 0: {half:,} elements of 3 tensors: param3 ... param1",
        f"  part 1 on rank 1: {3075 - half:,} elements of 2 tensors: param1 ... param0",
    ]
    assert second == ""
    whole, _ = ranks(2).run(_printed, False)
    assert whole.splitlines()[1:] == ["  every rank owns all of 4 tensors, param0 ... param3"]
