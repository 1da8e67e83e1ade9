"""The dense feed-forward layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.kernels import liger
from tinytron.model.modules.linear import PackedLinear, ResidualLinear


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202); gate and up are one matrix, ``[2F, D]``, gate first.

    Shapes: ``[..., D] -> [..., D]``.
    """

    liger = False  # whether by kernels/liger.py

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = ResidualLinear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(gated(self.gate_up_proj(x), by_liger=self.liger))
        return out


def gated(gate_up: torch.Tensor, *, by_liger: bool = False) -> torch.Tensor:
    """``silu(gate) * up`` of the two halves of the last dimension, ``[..., 2F] -> [..., F]``."""
    if by_liger:
        return liger.swiglu(gate_up)
    if torch.compiler.is_compiling():  # which chooses itself what to keep
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    product: torch.Tensor = _GateByHand.apply(gate_up)
    return product


class _GateByHand(torch.autograd.Function):
    """``silu(gate) * up``; keeps only ``[gate, up]`` for the backward pass, in which ``silu(gate)`` is computed again, and
    both gradients are written into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grads


class GELU(nn.Module):
    """``down(gelu(up(x)))`` (arXiv:1606.08415), exact or in the ``tanh`` approximation of GPT-2.

    Shapes: ``[..., D] -> [..., D]``.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool, approximate: Literal["none", "tanh"]
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = ResidualLinear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))
        return out


def make_mlp(
    kind: Literal["swiglu", "gelu", "gelu_tanh"], hidden_size: int, intermediate_size: int, bias: bool
) -> SwiGLU | GELU:
    """The feed-forward layer that ``--mlp_type`` names."""
    if kind == "swiglu":
        return SwiGLU(hidden_size, intermediate_size, bias)
    return GELU(hidden_size, intermediate_size, bias, "tanh" if kind == "gelu_tanh" else "none")
