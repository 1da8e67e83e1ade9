"""Exponential moving averages of the main weights. They are one more state of the inner optimizer for each shard, so they
are sharded, saved and loaded on another layout as its other states are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn

AVERAGE = "ema"  # the key in the inner optimizer's state


@torch.no_grad()
def update_averages(
    inner: torch.optim.Optimizer, shards: Iterable[nn.Parameter], decay: float, skip: torch.Tensor
) -> None:
    """Move each average by ``1 - decay`` of its distance to the weights; the first call copies them, as torch's
    ``AveragedModel`` does. With a ``skip`` of 1, on the device, averages stay where they are, and the host does not
    wait."""
    for shard in shards:
        state = inner.state[shard]
        if AVERAGE not in state:
            state[AVERAGE] = shard.detach().clone()
        else:
            state[AVERAGE].lerp_(shard.detach(), (1 - skip.to(shard.dtype)) * (1 - decay))


@torch.no_grad()
def swap_averages(inner: torch.optim.Optimizer, shards: Iterable[nn.Parameter]) -> None:
    """Exchange the main weights and their averages, where there are any; a second call puts both back, bit for bit."""
    for shard in shards:
        if (average := inner.state[shard].get(AVERAGE)) is not None:
            weights = shard.detach().clone()
            shard.copy_(average)
            average.copy_(weights)
