"""What each source of a mixture contributes, and how well it is predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinytron.data.batch import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.model.modules.loss import IGNORE_INDEX, LossSums


class SourceLosses:
    """Collects the loss of every source between two reports, on the device; ``names`` are those of the sources, none for
    data without."""

    def __init__(self, names: Sequence[str], state: ParallelState) -> None:
        self.names, self._state = list(names), state
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=state.device)  # nats, targets

    @torch.no_grad()
    def add(self, batch: Batch, losses: LossSums) -> None:
        """Count one micro-batch, if it says where its rows are from and ``losses`` has those of every token."""
        if batch.sources is None or losses.per_token is None:
            return
        valid_Bs = batch.labels != IGNORE_INDEX
        rows_2B = torch.stack(
            [losses.per_token.view_as(valid_Bs).sum(1, dtype=torch.float64), valid_Bs.sum(1).double()]
        )
        self._sums.index_add_(1, batch.sources, rows_2B)

    def flush(self) -> dict[str, tuple[float, int]]:
        """Loss in nats per target (not weighted) and number of targets of every source that had any. Collective."""
        nats, targets = sum_over(self._sums, self._state.groups["world"]).tolist()
        self._sums.zero_()
        counted = zip(self.names, nats, targets, strict=True)
        return {name: (total / count, int(count)) for name, total, count in counted if count}
