"""Linear layers whose class states their purpose."""

from __future__ import annotations

import torch.nn as nn


class ResidualLinear(nn.Linear):
    """A projection whose output is added to the residual stream; its initial weights are scaled down with depth."""


class PackedLinear(nn.Linear):
    """Several projections of one input, packed into one matrix; ``row_blocks`` are their output sizes, in order, and
    ``names`` what each would be called alone."""

    def __init__(self, in_features: int, row_blocks: tuple[int, ...], names: tuple[str, ...], bias: bool) -> None:
        super().__init__(in_features, sum(row_blocks), bias=bias)
        self.row_blocks, self.names = row_blocks, names
