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
from tinytron.metrics.sources import SourceLoss, bits_per_byte, bytes_of_labels, perplexity
from tinytron.model.modules.loss import LossSums


class ValResult(NamedTuple):
    """``loss`` in nats per token over ``tokens`` targets (weighted, if they have weights); ``bits_per_byte`` (not
    weighted), if it is known which bytes tokens stand for; of a mixture also the same for every source."""

    loss: float
    tokens: int
    sources: dict[str, SourceLoss]
    bits_per_byte: float | None = None

    def fields(self) -> dict[str, Any]:
        """What the log keeps."""
        known: dict[str, Any] = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        if self.sources:
            known["sources"] = {name: source.fields() for name, source in self.sources.items()}
        return {"loss": self.loss, "perplexity": perplexity(self.loss), "tokens": self.tokens, **known}


@torch.no_grad()
def validate(
    model: nn.Module,
    loss: Callable[[Batch], LossSums],
    batches: Iterable[Batch],
    state: ParallelState,
    sources: Sequence[str] = (),
    token_bytes_V: torch.Tensor | None = None,
) -> ValResult:
    """Sum ``loss`` over this rank's ``batches`` (on the device) and over the ranks. Collective over the world.

    ``token_bytes_V``, int64 ``[V]``: the bytes of every token id. A token without bytes (end of text) adds loss only.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=state.device)
    by_source = SourceLosses(sources, state, token_bytes_V)
    for batch in batches:
        losses = loss(batch)
        plain = losses.token if losses.per_token is None else losses.per_token.sum(dtype=torch.float64)
        size = batch.targets() * 0 if token_bytes_V is None else bytes_of_labels(batch.labels, token_bytes_V).sum()
        counts = (batch.target_weight(), batch.targets().double(), plain.double(), size.double())
        sums += torch.stack([losses.token.double(), *counts])
        by_source.add(batch, losses)
    model.train(was_training)
    nats, weight, tokens, plain_nats, text_bytes = sum_over(sums, state.groups["world"]).tolist()
    return ValResult(
        nats / weight if weight else 0.0,
        int(tokens),
        by_source.flush() if sources else {},
        bits_per_byte(plain_nats, text_bytes),
    )
