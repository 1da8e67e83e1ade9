"""The loss on each source of a mixture, and the source's contribution to training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tinytron.data.batch import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import IGNORE_INDEX


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite if it does not fit into a float."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """A loss of ``nats`` on ``text_bytes`` bytes of text, in bits per byte; ``None`` without bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else None


class SourceLoss(NamedTuple):
    """Loss in nats per target (not weighted), number of targets, and number of bytes they stand for (0 if unknown)."""

    loss: float
    targets: int
    text_bytes: int = 0

    def fields(self) -> dict[str, Any]:
        """The values for the log."""
        bits = bits_per_byte(self.loss * self.targets, self.text_bytes)
        known = {} if bits is None else {"bits_per_byte": bits}
        return {"loss": self.loss, "perplexity": perplexity(self.loss), "targets": self.targets, **known}


def bytes_of_labels(labels: torch.Tensor, token_bytes_V: torch.Tensor) -> torch.Tensor:
    """The number of bytes that each label stands for, int64, in the shape of ``labels``; 0 for an ignored label."""
    return torch.where(labels == IGNORE_INDEX, 0, token_bytes_V[labels.clamp(min=0)])


class SourceLosses:
    """Collects the loss of each source between two reports, on the device.

    ``names`` are the sources' names, empty for data without sources. ``token_bytes_V`` is the number of bytes that each
    token id stands for, int64 ``[V]``. ``sums`` has the nats, targets and bytes counted so far by source, float64
    ``[3, names]``.
    """

    def __init__(self, names: Sequence[str], state: ParallelState, token_bytes_V: torch.Tensor | None = None) -> None:
        self.names, self._state, self._bytes = list(names), state, token_bytes_V
        self.sums = torch.zeros(3, len(self.names), dtype=torch.float64, device=state.device)

    @torch.no_grad()
    def add(self, batch: Batch, losses: LossSums) -> None:
        """Count one micro-batch, if it has the sources of its rows and ``losses`` has a loss for each token."""
        if batch.sources is None or losses.per_token is None:
            return
        valid_Bs = batch.labels != IGNORE_INDEX
        nats_B = losses.per_token.view_as(valid_Bs).sum(1, dtype=torch.float64)
        targets_B = valid_Bs.sum(1).double()
        bytes_B = torch.zeros_like(nats_B)
        if self._bytes is not None:
            bytes_B = bytes_of_labels(batch.labels, self._bytes).sum(1).double()
        self.sums.index_add_(1, batch.sources, torch.stack([nats_B, targets_B, bytes_B]))

    def flush(self) -> dict[str, SourceLoss]:
        """The loss of each source that had any targets since the last call. Collective."""
        nats, targets, sizes = sum_over(self.sums, self._state.groups["world"]).tolist()
        self.sums.zero_()
        counted = zip(self.names, nats, targets, sizes, strict=True)
        return {name: SourceLoss(total / count, int(count), int(size)) for name, total, count, size in counted if count}

    def record(self, seen: Mapping[str, int]) -> dict[str, Any]:
        """The log entry with each source's loss since the last call, and with the tokens of it ``seen`` since the start.
        Collective."""
        return {"sources": {n: {**loss.fields(), "tokens_seen": seen.get(n)} for n, loss in self.flush().items()}}
