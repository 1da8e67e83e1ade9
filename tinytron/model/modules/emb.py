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
    """Cosines and sines per position, ``[S, 1, R/2]`` or ``[B, S, 1, R/2]`` for the first R elements of a head, in fp32
    (fp64 for fp64 models)."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding(nn.Module):
    """The table of RoPE angles for positions ``0 .. block_size - 1``, computed once (arXiv:2104.09864, section 3.4.2).

    ``frequencies`` ``[R/2]`` are radians per position; cosines and sines are multiplied by ``scale``. Not part of
    ``state_dict``: it is a function of the configuration.
    """

    def __init__(self, frequencies: torch.Tensor, block_size: int, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        # In float64 first: at position 4095 an fp32 angle is already off by 1e-4.
        angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies.double())
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", (angles.cos() * scale).to(dtype).unsqueeze(1), persistent=False)
        self.register_buffer("sin", (angles.sin() * scale).to(dtype).unsqueeze(1), persistent=False)

    def forward(self, first: int, count: int, positions: torch.Tensor | None = None) -> Rotation:
        """The rotations of ``count`` positions from ``first`` on, or of ``positions`` ``[S]`` or ``[B, S]``."""
        if positions is None:
            return Rotation(self.cos[first : first + count], self.sin[first : first + count])
        return Rotation(self.cos[positions], self.sin[positions])


def rotate(x_BSNH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn each pair ``(x[i], x[i + R/2])`` by its position's angle, in the table's precision; elements from R on stay.

    The pairing is that of GPT-NeoX and Llama in Hugging Face. Scores of rotated queries and keys depend on the
    relative position only, and norms do not change.
    """
    R = 2 * rotation.cos.shape[-1]
    if R == 0:
        return x_BSNH
    # torch.compile derives the same backward pass, and caches no graph with a Function across processes.
    turn = _turn if torch.compiler.is_compiling() else _Rotate.apply
    rotated: torch.Tensor
    if x_BSNH.shape[-1] == R:
        rotated = turn(x_BSNH, *rotation)
        return rotated
    rotated = turn(x_BSNH[..., :R], *rotation)
    return torch.cat((rotated, x_BSNH[..., R:]), dim=-1)


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
