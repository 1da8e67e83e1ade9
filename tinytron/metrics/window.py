"""Results of the steps since the last report, kept on the device: the host waits once per report, not once per step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tinytron.distributed.collectives import sum_over


@dataclass(frozen=True)
class StepRecord:
    """What is known of one optimizer step: loss in nats per token of the global batch, norm before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float


class StepWindow:
    """Collects the steps between two reports."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._steps: list[tuple[int, float]] = []
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []

    def add(self, step: int, lr: float, loss_part: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Keep one step's device scalars; the loss is the sum of ``loss_part`` over the ranks of the group."""
        self._steps.append((step, lr))
        self._losses.append(loss_part)
        self._norms.append(grad_norm)

    def flush(self) -> list[StepRecord]:
        """The records since the last flush: one reduction, one copy to the host. Collective."""
        if not self._steps:
            return []
        losses = sum_over(torch.stack(self._losses).double(), self._group)
        loss_values, norm_values = torch.stack([losses, torch.stack(self._norms).double()]).tolist()
        records = [
            StepRecord(step, loss, lr, norm)
            for (step, lr), loss, norm in zip(self._steps, loss_values, norm_values, strict=True)
        ]
        self._steps, self._losses, self._norms = [], [], []
        return records
