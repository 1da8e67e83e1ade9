"""The loss by position in the sequence."""

from __future__ import annotations

import torch

from tinytron.data.batch import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import IGNORE_INDEX

FIRST = 8  # positions in the first bucket; each later one has as many as all before it


class LossByPosition:
    """Collects the loss of a step's targets, in nats and not weighted, by position in the whole sequence, in buckets whose
    bounds are powers of two: 0-7, 8-15, 16-31, ..., up to ``block_size``."""

    def __init__(self, state: ParallelState, seq_len: int) -> None:
        self._state = state
        self._bounds = [FIRST]
        while self._bounds[-1] < seq_len:
            self._bounds.append(2 * self._bounds[-1])
        self._upper = torch.tensor(self._bounds, device=state.device)
        self._sums: torch.Tensor | None = None

    def begin(self) -> None:
        """Measure the next step."""
        self._sums = torch.zeros(2, len(self._bounds), dtype=torch.float64, device=self._state.device)  # nats, targets

    @torch.no_grad()
    def add(self, batch: Batch, losses: LossSums) -> None:
        """Count a micro-batch. Raises: ConfigError without the losses of the tokens."""
        if self._sums is None:
            return
        if losses.per_token is None:
            raise ConfigError(
                "--log_loss_by_position needs the loss of each token, but this model or _loss returns LossSums without "
                "per_token; set it, or use --no-log_loss_by_position"
            )
        B, s = batch.labels.shape
        first = self._state.group_rank("sep") * s
        position_s = torch.arange(first, first + s, device=self._upper.device)
        bucket_s = torch.searchsorted(self._upper, position_s, right=True)
        valid_Bs = batch.labels != IGNORE_INDEX
        nats_s = losses.per_token.reshape(B, s).sum(0, dtype=torch.float64)
        self._sums.index_add_(1, bucket_s, torch.stack([nats_s, valid_Bs.sum(0).double()]))

    def record(self, step: int) -> dict[str, float]:
        """``loss_by_position/<first>-<last>`` for each bucket that has targets. Collective; the host waits."""
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        columns = zip(
            [0, *self._bounds], self._bounds, *sum_over(sums, self._state.groups["world"]).tolist(), strict=False
        )
        return {f"loss_by_position/{low}-{high - 1}": nats / count for low, high, nats, count in columns if count}
