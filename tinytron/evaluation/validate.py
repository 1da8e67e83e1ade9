"""Loss on held-out data: every sample once, weighted by tokens, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn as nn

from tinytron.data.loader import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.model.modules.loss import IGNORE_INDEX, LossSums


class ValResult(NamedTuple):
    """``loss`` in nats per token over ``tokens`` targets."""

    loss: float
    tokens: int


@torch.no_grad()
def validate(
    model: nn.Module, loss: Callable[[Batch], LossSums], batches: Iterable[Batch], state: ParallelState
) -> ValResult:
    """Sum ``loss`` over this rank's ``batches`` (on the device) and over the ranks. Collective over the world."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=state.device)
    for batch in batches:
        sums[0] += loss(batch).token
        sums[1] += (batch.labels != IGNORE_INDEX).sum()
    model.train(was_training)
    nats, tokens = sum_over(sums, state.groups["world"]).tolist()
    return ValResult(nats / max(1.0, tokens), int(tokens))
