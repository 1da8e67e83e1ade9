"""Norms of gradients, weights and updates, of each trained parameter and of all together."""

from __future__ import annotations

import math

from tinytron.distributed import DistributedOptimizer


class NormStatistics:
    """The ``TensorNorms`` of the steps of ``optimizer`` that are reported."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer

    def begin(self) -> None:
        """Measure the next step."""
        self._optimizer.measure_norms()

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
