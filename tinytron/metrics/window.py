"""Results of the steps since the last report, kept on the device: the host waits once per report, not once per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist

from tinytron.distributed.collectives import sum_over


@dataclass(frozen=True)
class StepRecord:
    """What is known of one optimizer step: loss in nats per token of the global batch, norm before clipping, auxiliary
    losses by name, each a mean over what it counts."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    aux: dict[str, float]

    def fields(self) -> dict[str, float]:
        """All values by name, auxiliary losses too."""
        return {"step": self.step, "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm, **self.aux}


class StepWindow:
    """Collects the steps between two reports."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._steps: list[tuple[int, float]] = []
        self._parts: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._names: list[str] = []
        self._counted: list[str] = []

    def add(
        self,
        step: int,
        lr: float,
        parts: dict[str, torch.Tensor],
        grad_norm: torch.Tensor,
        counts: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Keep one step's device scalars. ``parts`` has ``loss`` and any auxiliary terms, always the same; each is summed
        over the ranks of the group, and divided by the sum of its ``counts`` if it has one."""
        self._names, self._counted = list(parts), list(counts)
        self._steps.append((step, lr))
        self._parts.append(torch.stack([value.double() for value in (*parts.values(), *counts.values())]))
        self._norms.append(grad_norm)

    def flush(self) -> list[StepRecord]:
        """The records since the last flush: one reduction, one copy to the host. Collective."""
        if not self._steps:
            return []
        sums = sum_over(torch.stack(self._parts), self._group)
        rows = torch.cat([sums, torch.stack(self._norms).double().unsqueeze(1)], dim=1).tolist()
        records = []
        for (step, lr), (*values, norm) in zip(self._steps, rows, strict=True):
            aux = dict(zip(self._names, values[: len(self._names)], strict=True))
            for name, count in zip(self._counted, values[len(self._names) :], strict=True):
                aux[name] /= max(count, 1.0)
            records.append(StepRecord(step, aux.pop("loss"), lr, norm, aux))
        self._steps, self._parts, self._norms = [], [], []
        return records
