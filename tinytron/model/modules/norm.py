"""Normalisation layers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.kernels import liger


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension (arXiv:1910.07467).

    Shapes: ``[..., size] -> [..., size]``. 16-bit inputs have their statistics computed in fp32 inside ``rms_norm``.
    """

    liger = False  # whether by kernels/liger.py

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.liger:
            return liger.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension (arXiv:1607.06450).

    Shapes: ``[..., size] -> [..., size]``. 16-bit inputs have their statistics computed in fp32 inside ``layer_norm``.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(kind: Literal["rms", "layer"], size: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm that ``--norm_type`` names."""
    return RMSNorm(size, eps) if kind == "rms" else LayerNorm(size, eps)
