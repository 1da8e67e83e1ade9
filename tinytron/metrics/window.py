"""Results of the steps since the last report. They stay on the device, so the host waits once per report instead of once
per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist

from tinytron.distributed.collectives import sum_over


@dataclass(frozen=True)
class StepRecord:
    """The results of one optimizer step: loss in nats per token of the global batch, gradient norm before clipping, and
    auxiliary losses by name, each a mean over the items that it counts."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    aux: dict[str, float]

    def fields(self) -> dict[str, float]:
        """All values by name, including the auxiliary losses."""
        return {"step": self.step, "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm, **self.aux}


class StepWindow:
    """Collects the steps between two reports."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._steps: list[tuple[int, float]] = []
        self._parts: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._names: list[str] = []

    def add(
        self,
        step: int,
        lr: float,
        parts: dict[str, torch.Tensor],
        grad_norm: torch.Tensor,
        counts: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Store one step's device scalars. ``parts`` has ``loss`` and any auxiliary terms, with the same names in every
        step. Each is summed over the ranks of the group, and divided by the sum of its entry in ``counts`` if it has
        one."""
        self._names = list(parts)
        self._steps.append((step, lr))
        # A missing count becomes zero, so all ranks' rows have the same form even if one rank's loss forgot its counts.
        known = [counts.get(name, torch.zeros_like(value)) for name, value in parts.items()]
        self._parts.append(torch.stack([value.double() for value in (*parts.values(), *known)]))
        self._norms.append(grad_norm)

    def drop_last(self) -> None:
        """Take the newest step back, because a further update belongs to the same step."""
        for entries in (self._steps, self._parts, self._norms):
            entries.pop()

    def flush(self) -> list[StepRecord]:
        """The records since the last flush: one reduction, one copy to the host. Collective."""
        if not self._steps:
            return []
        sums = sum_over(torch.stack(self._parts), self._group)
        rows = torch.cat([sums, torch.stack(self._norms).double().unsqueeze(1)], dim=1).tolist()
        records = []
        for (step, lr), (*values, norm) in zip(self._steps, rows, strict=True):
            own, counts = values[: len(self._names)], values[len(self._names) :]
            means = [value / count if count else value for value, count in zip(own, counts, strict=True)]
            aux = dict(zip(self._names, means, strict=True))
            records.append(StepRecord(step, aux.pop("loss"), lr, norm, aux))
        self._steps = []
        self._parts = []
        self._norms = []
        return records
