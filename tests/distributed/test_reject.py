"""A step that the caller rejects: nothing changes on any rank, and the loss scale does not take it for an overflow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.helpers.ranks import Ranks
from tinytron.distributed import DistributedOptimizer

Pools = Callable[[int], Ranks]


def _reject(shard: bool, fused: bool) -> list[float]:
    net = nn.Linear(3, 5, bias=False)
    nn.init.ones_(net.weight)
    inner = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    optimizer = DistributedOptimizer(inner, None, shard=shard, loss_scaling=True, ema_decay=0.5)
    scale, norms, weights, averages = float(optimizer.loss_scale), [], [], []
    for step in range(4):
        with optimizer.accumulate(last=True):
            optimizer.scale(net(torch.full((1, 3), dist.get_rank() + step + 1.0)).sum()).backward()
        seen: list[torch.Tensor] = []

        def reject(norm: torch.Tensor, step: int = step, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(norm)
            return norm > 0 if step in (0, 3) else norm < 0

        norm = optimizer.step(reject=reject)
        assert seen == [norm]
        assert bool(optimizer.last_skipped) == (step in (0, 3))
        optimizer.zero_grad()
        norms.append(float(norm))
        weights.append(net.weight.detach().clone())
        with optimizer.averaged():
            averages.append(net.weight.detach().clone())
        assert torch.equal(net.weight, weights[-1])
    assert torch.equal(weights[0], torch.ones(5, 3))
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[2], weights[1])
    assert torch.equal(averages[0], weights[0])  # there is none yet
    assert torch.equal(averages[1], weights[1])  # the first accepted step's
    torch.testing.assert_close(averages[2], (weights[1] + weights[2]) / 2)
    assert torch.equal(averages[3], averages[2])
    assert all(float(state["step"]) == 2 for state in inner.state.values())
    assert (float(optimizer.skipped_steps), float(optimizer.loss_scale)) == (2, scale)
    return norms


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_rejected_step_changes_nothing(ranks: Pools, shard: bool, fused: bool) -> None:
    ranks(2).run(_reject, shard, fused)
