"""The frequencies of plain rotary positions."""

from __future__ import annotations

import torch


def frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """Radians per position of each pair of a head's elements."""
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
