"""Normalisation layers."""

from __future__ import annotations

from typing import Any, Literal

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
        if not (x.is_cuda or torch.compiler.is_compiling()):
            out: torch.Tensor = _RMSNormByHand.apply(x, self.weight, self.eps)
            return out
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNormByHand(torch.autograd.Function):
    """``F.rms_norm`` has no kernel for CPUs: its parts keep the input in fp32 twice for the backward pass. This keeps the
    input as it is, and one number per row."""

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
        wide, normal = weight.to(scale.dtype), torch.mul(x, scale)  # in fp32, as all of what follows
        product = normal * grad
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        # d x = scale (g w - normal mean(g w normal))
        mean = torch.mv(product.flatten(0, -2), wide).view(scale.shape) / x.shape[-1]
        grad_x = torch.mul(grad, wide, out=product).addcmul_(normal, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


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
