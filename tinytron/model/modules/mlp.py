"""The dense feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.model.modules.linear import PackedLinear, ResidualLinear


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202); gate and up are one matrix, ``[2F, D]``, gate first.

    Shapes: ``[..., D] -> [..., D]``.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = ResidualLinear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return out
