"""Loss on held-out data: every sample once, weighted by tokens, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.metrics import SourceLosses
from tinytron.model.modules.loss import LossSums


class ValResult(NamedTuple):
    """``loss`` in nats per token over ``tokens`` targets (weighted, if they have weights); of a mixture also the loss (not
    weighted) and the targets of every source."""

    loss: float
    tokens: int
    sources: dict[str, tuple[float, int]]

    def fields(self) -> dict[str, Any]:
        """What the log keeps."""
        sources = {name: {"loss": loss, "targets": targets} for name, (loss, targets) in self.sources.items()}
        return {"loss": self.loss, "tokens": self.tokens} | ({"sources": sources} if sources else {})


@torch.no_grad()
def validate(
    model: nn.Module,
    loss: Callable[[Batch], LossSums],
    batches: Iterable[Batch],
    state: ParallelState,
    sources: Sequence[str] = (),
) -> ValResult:
    """Sum ``loss`` over this rank's ``batches`` (on the device) and over the ranks. Collective over the world."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=state.device)
    by_source = SourceLosses(sources, state)
    for batch in batches:
        losses = loss(batch)
        sums += torch.stack([losses.token.double(), batch.target_weight(), batch.targets().double()])
        by_source.add(batch, losses)
    model.train(was_training)
    nats, weight, tokens = sum_over(sums, state.groups["world"]).tolist()
    return ValResult(nats / weight if weight else 0.0, int(tokens), by_source.flush() if sources else {})
