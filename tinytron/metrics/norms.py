"""Norms of gradients, weights and updates, of each trained parameter and of all together."""

from __future__ import annotations

import math

from tinytron.distributed import DistributedOptimizer, ParallelState
from tinytron.distributed.zero1.norms import TensorNorms


class NormStatistics:
    """The ``TensorNorms`` of the steps of ``optimizer`` that are reported."""

    def __init__(self, optimizer: DistributedOptimizer, state: ParallelState) -> None:
        self._optimizer, self._state = optimizer, state
        self._norms: TensorNorms | None = None

    def begin(self) -> None:
        """Measure the next step."""
        buffers = self._optimizer.buffers
        if self._norms is None or self._norms.buffers is not buffers:  # making one copies an index to the device
            self._norms = TensorNorms(buffers, self._state, self._optimizer.loss_scale)
        self._optimizer.tensor_norms = self._norms

    def record(self, step: int) -> dict[str, float]:
        """``grad_norms/<parameter>``, ``param_norms/`` and ``update_norms/``, and ``param_norm`` and ``update_norm`` of all
        (``grad_norm`` is in every record). Collective."""
        norms, self._optimizer.tensor_norms = self._optimizer.tensor_norms, None
        if norms is None:
            return {}
        found: dict[str, float] = {}
        for kind, by_name in norms.totals().items():
            found |= {f"{kind}_norms/{name}": norm for name, norm in by_name.items()}
            if kind != "grad":
                found[f"{kind}_norm"] = math.hypot(*by_name.values())
        return found
