"""Where the time of a step goes, and the rank that the others wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.utils.memory import GIB, peak_memory
from tinytron.utils.phases import BACKWARD, DATA, EXCHANGE, FORWARD, PHASES, UPDATE

# A rank's work by itself. The other ranks wait for a slow one in the exchange of gradients.
_OWN = (DATA, FORWARD, BACKWARD, UPDATE)


def phase_record(seconds: Mapping[str, float], steps: int, state: ParallelState, alone: float) -> dict[str, Any]:
    """The log entry for the ``seconds`` that each phase took on this rank in ``steps`` steps: ``phases``, seconds per step,
    the mean of all ranks; and ``peak_memory_gib``, the most that a rank had so far (``peak_memory``).

    With several ranks it also has ``slowest_rank``, the one with the most time of its own; ``slowest_excess``, by which
    fraction that exceeds the median rank's; and ``hidden_exchange``, the seconds of a step's exchange, which takes
    ``alone`` seconds by itself, that the backward pass hides. Collective."""
    world = state.layout.world_size
    rows = torch.zeros(world, len(PHASES) + 1, dtype=torch.float64, device=state.device)
    own = [*(seconds[name] / steps for name in PHASES), peak_memory(state.device) / GIB]
    rows[state.rank] = torch.tensor(own, dtype=torch.float64)
    rows = sum_over(rows, state.groups["world"]).cpu()
    rows_RP = rows[:, :-1]
    record: dict[str, Any] = {
        "phases": dict(zip(PHASES, rows_RP.mean(0).tolist(), strict=True)),
        "peak_memory_gib": float(rows[:, -1].max()),
    }
    if world > 1:
        own_R = rows_RP[:, [PHASES.index(name) for name in _OWN]].sum(1)
        slowest, median = int(own_R.argmax()), float(own_R.quantile(0.5))
        record |= {"slowest_rank": slowest, "slowest_excess": float(own_R[slowest]) / median - 1 if median else 0.0}
        exposed = float(rows_RP[:, PHASES.index(EXCHANGE)].min())  # the others also wait for the slowest rank
        record["hidden_exchange"] = max(0.0, alone - exposed)
    return record
