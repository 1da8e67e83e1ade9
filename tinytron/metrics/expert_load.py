"""Statistics of how evenly tokens are spread over the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def load_statistics(load_LE: list[list[int]], layers: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Load statistics of each expert layer, computed from the number of rows that each expert got.

    ``fractions`` are the experts' shares. ``entropy`` is their entropy relative to an even load (1 is even, 0 is a single
    expert). ``max_violation`` is the largest excess over the mean (``MaxVio`` of arXiv:2408.15664: 0 is even). ``dead``
    counts the experts that got no rows. ``layers`` are the block numbers of the rows of ``load_LE`` (default: from 0).
    """
    statistics = []
    for layer, load_E in zip(layers or range(len(load_LE)), load_LE, strict=True):
        total = max(1, sum(load_E))
        experts = len(load_E)
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
