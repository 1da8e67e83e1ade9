"""The rotation of queries and keys by their positions (RoPE, arXiv:2104.09864).

Liger's kernel is not used, because it needs queries and keys as separate contiguous tensors, which it overwrites;
``rotate`` rotates both in one pass, straight from the packed projection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Rotation(NamedTuple):
    """Cosines and sines of each position, ``[S, 1, R/2]`` or ``[B, S, 1, R/2]``, for the first R elements of a head, in
    fp32 (fp64 for fp64 models)."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotate(x_BSNH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate each pair ``(x[i], x[i + R/2])`` by its position's angle, in the table's precision; elements after the first
    R stay unchanged.

    The pairing is the one that Hugging Face uses for GPT-NeoX and Llama. Scores of rotated queries and keys depend only on
    the relative position, and norms do not change.
    """
    R = 2 * rotation.cos.shape[-1]
    if R == 0:
        return x_BSNH
    # torch.compile derives the same backward pass, and it cannot cache a graph with a Function across processes.
    turn = _turn if torch.compiler.is_compiling() else _Rotate.apply
    rotated: torch.Tensor
    if x_BSNH.shape[-1] == R:
        rotated = turn(x_BSNH, *rotation)
        return rotated
    rotated = turn(x_BSNH[..., :R], *rotation)
    return torch.cat((rotated, x_BSNH[..., R:]), dim=-1)


class _Rotate(torch.autograd.Function):
    """A hand-written Function, because autograd would keep the halves and add them up, while the gradient only needs to be
    rotated back."""

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
    if torch.compiler.is_compiling():  # the compiler fuses this, and it cannot trace writes into the two halves
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSNH.dtype)
    turned = torch.empty(x_BSNH.shape, dtype=cos.dtype, device=x_BSNH.device)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return turned.to(x_BSNH.dtype)
