"""Token embedding, and rotary position embeddings (RoPE)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn


class TokenEmbedding(nn.Embedding):
    """``weight[ids]`` whose gradient is summed in fp32 (fp64): torch's CPU kernel sums in the weight's own precision, and
    in bf16 a token that occurs 256 times stops counting. Shapes: ``[...] -> [..., D]``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _Lookup.apply(self.weight, ids)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight_VD.shape[0]
        return weight_VD[ids]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        # The native kernel rather than index_add_: it is deterministic on CUDA.
        return torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False), None


class Rotation(NamedTuple):
    """Cosines and sines per position, ``[S, 1, H/2]`` or ``[B, S, 1, H/2]``, in fp32 (fp64 for fp64 models)."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding(nn.Module):
    """The table of RoPE angles for positions ``0 .. block_size - 1``, computed once (arXiv:2104.09864, section 3.4.2).

    Not part of ``state_dict``: it is a function of the configuration.
    """

    def __init__(self, head_dim: int, block_size: int, theta: float, dtype: torch.dtype) -> None:
        super().__init__()
        # In float64 first: at position 4095 an fp32 angle is already off by 1e-4.
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos().to(dtype).unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype).unsqueeze(1), persistent=False)

    def forward(self, first: int, count: int, positions: torch.Tensor | None = None) -> Rotation:
        """The rotations of ``count`` positions from ``first`` on, or of ``positions`` ``[S]`` or ``[B, S]``."""
        if positions is None:
            return Rotation(self.cos[first : first + count], self.sin[first : first + count])
        return Rotation(self.cos[positions], self.sin[positions])


def rotate(x_BSNH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn each pair ``(x[i], x[i + H/2])`` by its position's angle, in the table's precision.

    The pairing is that of GPT-NeoX and Llama in Hugging Face. Scores of rotated queries and keys depend on the
    relative position only, and norms do not change.
    """
    rotated: torch.Tensor = _Rotate.apply(x_BSNH, *rotation)
    return rotated


class _Rotate(torch.autograd.Function):
    """By hand, because autograd would keep and add up the halves: the gradient is turned back, nothing else is needed."""

    @staticmethod
    def forward(ctx: Any, x_BSNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BSNH, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x_BSNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_BSNH.to(cos.dtype).chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which fuses these, and cannot trace results written into halves
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSNH.dtype)
    turned = torch.empty(x_BSNH.shape, dtype=cos.dtype, device=x_BSNH.device)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return turned.to(x_BSNH.dtype)
