"""How evenly the experts are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def load_statistics(load_LE: list[list[int]], layers: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Per expert layer, from the rows each expert got: their fractions; the entropy of those relative to an even load's (1
    is even, 0 is one expert); the largest excess over the mean (``MaxVio`` of arXiv:2408.15664: 0 is even); and how many
    experts got nothing. ``layers`` are the blocks that the rows belong to (default: counted from 0)."""
    statistics = []
    for layer, load_E in zip(layers or range(len(load_LE)), load_LE, strict=True):
        total, experts = max(1, sum(load_E)), len(load_E)
        fractions = [rows / total for rows in load_E]
        entropy = -sum(f * math.log(f) for f in fractions if f > 0)
        statistics.append(
            {
                "layer": layer,
                "fractions": [round(f, 6) for f in fractions],
                "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
                "max_violation": max(fractions) * experts - 1,
                "dead": sum(rows == 0 for rows in load_E),
            }
        )
    return statistics
