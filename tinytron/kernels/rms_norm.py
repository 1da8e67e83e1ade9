"""RMSNorm: ``x / sqrt(mean(x²) + eps) * weight`` over the last dimension (arXiv:1910.07467)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from tinytron.kernels.choice import LigerKernel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, by: LigerKernel = "torch") -> torch.Tensor:
    """RMSNorm over the last dimension, ``[..., D] -> [..., D]``, in the precision of ``x``; statistics of 16-bit
    inputs are in fp32.

    ``torch`` is torch's function on CUDA and inside compiled code, and a hand-written one elsewhere. ``liger`` is
    the Triton kernel of the liger-kernel package (arXiv:2410.10989): the same function apart from rounding.
    """
    out: torch.Tensor
    if by == "liger":
        liger = importlib.import_module("liger_kernel.ops")
        # "gemma" computes everything in fp32 and rounds once at the end, like torch ("llama" rounds before the weight).
        # It must not work in place, because other code may still read the incoming gradient.
        out = liger.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
        return out
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    out = _RMSNormByHand.apply(x, weight, eps)
    return out


class _RMSNormByHand(torch.autograd.Function):
    """RMSNorm for CPUs, where ``F.rms_norm`` has no kernel of its own: it is composed of operations that keep the
    input twice in fp32 for the backward pass. This function keeps the input as it is and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        wide = weight.to(scale.dtype)  # fp32, like everything below
        normal = torch.mul(x, scale)
        product = normal * grad
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        # d x = scale (g w - normal mean(g w normal))
        mean = torch.mv(product.flatten(0, -2), wide).view(scale.shape) / x.shape[-1]
        grad_x = torch.mul(grad, wide, out=product).addcmul_(normal, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
