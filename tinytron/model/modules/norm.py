"""Normalization layers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.kernels.choice import DEFAULT, Kernels
from tinytron.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension: ``[..., size] -> [..., size]``."""

    def __init__(self, size: int, eps: float, kernels: Kernels = DEFAULT) -> None:
        super().__init__()
        self.eps, self.by = eps, kernels.rms_norm
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.by)


class LayerNorm(nn.Module):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension (arXiv:1607.06450).

    Shapes: ``[..., size] -> [..., size]``. For 16-bit inputs ``layer_norm`` computes the statistics in fp32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(kind: Literal["rms", "layer"], size: int, eps: float, kernels: Kernels = DEFAULT) -> RMSNorm | LayerNorm:
    """The norm that ``--norm_type`` names."""
    return RMSNorm(size, eps, kernels) if kind == "rms" else LayerNorm(size, eps)
