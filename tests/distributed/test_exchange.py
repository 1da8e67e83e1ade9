"""Exchanges of rows, and their adjoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.distributed.exchange import all_to_all

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


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
