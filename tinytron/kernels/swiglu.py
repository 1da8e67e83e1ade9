"""The gated product of SwiGLU: ``silu(gate) * up`` (arXiv:2002.05202)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from tinytron.kernels.choice import LigerKernel


def swiglu(gate_up: torch.Tensor, by: LigerKernel = "torch") -> torch.Tensor:
    """``silu(gate) * up`` for the two halves of the last dimension, gate first: ``[..., 2F] -> [..., F]``.

    ``torch`` is a hand-written function; in compiled code the compiler decides what to keep. ``liger`` is the
    Triton kernel of the liger-kernel package (arXiv:2410.10989), which copies neither half and computes in
    fp32.
    """
    product: torch.Tensor
    if by == "liger":
        product = importlib.import_module("liger_kernel.ops").LigerFusedGateUpSiLUMulFunction.apply(gate_up)
        return product
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    product = _SwiGLUByHand.apply(gate_up)
    return product


class _SwiGLUByHand(torch.autograd.Function):
    """SwiGLU that keeps only ``[gate, up]`` for the backward pass, which recomputes ``silu(gate)`` and writes both
    gradients to one tensor."""

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
