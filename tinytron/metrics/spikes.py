"""Detection of steps whose loss or gradient norm spikes, done on the device, so that the host does not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tinytron.distributed.collectives import sum_over

PATIENCE = 20  # values needed before judging, and consecutive rejections that mean a new level instead of a spike
_KINDS = ("loss", "grad norm")
NOTHING_ACCEPTED: dict[str, Any] = {"values": {kind: [] for kind in _KINDS}, "in_a_row": 0}  # a ``state_dict``


class Spike(NamedTuple):
    """A rejected optimizer step (``step`` counts from 1): its ``kind`` was ``value``, which is above ``limit``."""

    step: int
    kind: str
    value: float
    limit: float


class SpikeDetector:
    """Keeps the loss (nats per token) and the gradient norm of the last ``window`` accepted steps, and rejects a step if
    either value exceeds the mean + ``sigma`` x standard deviation. ``sigma`` 0 turns the detector off.

    The first ``min(window, PATIENCE)`` values are not judged. Rejected values do not enter the window. ``PATIENCE`` spikes
    in a row empty it: the weights did not change meanwhile, so the data must be different, and otherwise every further
    step would be rejected. A step with a non-finite value is always rejected, but it does not count as a spike.
    """

    def __init__(self, sigma: float, window: int, device: torch.device, group: dist.ProcessGroup) -> None:
        self.sigma, self.window, self._group = sigma, window, group
        self._first_judged = min(window, PATIENCE)
        # One row for each of _KINDS, oldest value first and newest last, so that a resumed run sums in the same order.
        self._values_KW = torch.zeros(len(_KINDS), window, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._spike = torch.zeros(4, dtype=torch.float64, device=device)  # the fields of a Spike; step 0 means none
        self._newest_first = torch.arange(window, 0, -1, device=device)

    def judge(self, step: int, loss: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The ``reject`` function for ``DistributedOptimizer.step``, which maps the gradient norm to whether step
        ``step`` is rejected; ``None`` if the detector is off. ``loss`` is this rank's part of the global loss.
        Collective over the group."""
        if self.sigma == 0:
            return None
        total = sum_over(loss.detach().double().clone(), self._group)
        return lambda norm: self._reject(step, torch.stack([total, norm.double()]))

    def _reject(self, step: int, values_K: torch.Tensor) -> torch.Tensor:
        limits_K = self._limits()
        finite = values_K.isfinite().all()
        above_K = values_K > limits_K
        spike = above_K.any() & finite  # a non-finite value is not a spike: fp16 overflows until the loss scale settles
        rejected = spike | ~finite
        kind_1 = above_K.int().argmax().unsqueeze(0)  # the first kind above its limit
        found = (values_K.new_full((1,), step), kind_1.double(), values_K.gather(0, kind_1), limits_K.gather(0, kind_1))
        self._spike = torch.where(spike & (self._spike[0] == 0), torch.cat(found), self._spike)
        shifted_KW = torch.cat([self._values_KW[:, 1:], values_K[:, None]], dim=1)
        self._values_KW = torch.where(rejected, self._values_KW, shifted_KW)
        self._in_a_row = torch.where(rejected, self._in_a_row + spike, 0)
        self._count = torch.where(rejected, self._count, (self._count + 1).clamp(max=self.window))
        new_level = self._in_a_row >= PATIENCE
        self._count = torch.where(new_level, 0, self._count)
        self._in_a_row = torch.where(new_level, 0, self._in_a_row)
        return rejected

    def _limits(self) -> torch.Tensor:
        """The largest acceptable value of each kind; infinite while there are too few values to judge."""
        known_W = self._newest_first <= self._count
        count = self._count.clamp(min=1)
        mean_K = torch.where(known_W, self._values_KW, 0.0).sum(1) / count
        variance_K = torch.where(known_W, (self._values_KW - mean_K[:, None]).square(), 0.0).sum(1) / count
        limits_K = mean_K + self.sigma * variance_K.sqrt()
        return torch.where(self._count >= self._first_judged, limits_K, torch.inf)

    def first_spike(self) -> Spike | None:
        """The first step rejected since the last call; the host waits for the device."""
        if self.sigma == 0:
            return None
        step, kind, value, limit = self._spike.tolist()
        self._spike.zero_()
        return Spike(int(step), _KINDS[int(kind)], value, limit) if step else None

    def state_dict(self) -> dict[str, Any]:
        """The accepted values, oldest first, and the number of rejections in a row, as plain numbers; the host waits."""
        first = self.window - int(self._count)
        values = {kind: row[first:].tolist() for kind, row in zip(_KINDS, self._values_KW, strict=True)}
        return {"values": values, "in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``; if its window was longer, only its newest values are kept."""
        kept = [state["values"][kind][-self.window :] for kind in _KINDS]
        count = len(kept[0])
        self._values_KW.zero_()
        self._values_KW[:, self.window - count :] = torch.tensor(kept, dtype=torch.float64)
        self._count.fill_(count)
        self._in_a_row.fill_(state["in_a_row"])
        self._spike.zero_()
