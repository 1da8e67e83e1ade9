"""Token embeddings are ``nn.Embedding``; this file has the positions: rotary embeddings (RoPE)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn


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

    def forward(self, seq_len: int, positions: torch.Tensor | None = None) -> Rotation:
        """The rotations of positions ``0 .. seq_len - 1``, or of ``positions`` ``[S]`` or ``[B, S]``."""
        if positions is None:
            return Rotation(self.cos[:seq_len], self.sin[:seq_len])
        return Rotation(self.cos[positions], self.sin[positions])


def rotate(x_BSNH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn each pair ``(x[i], x[i + H/2])`` by its position's angle, in the table's precision.

    The pairing is that of GPT-NeoX and Llama in Hugging Face. Scores of rotated queries and keys depend on the
    relative position only, and norms do not change.
    """
    first, second = x_BSNH.to(rotation.cos.dtype).chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSNH.dtype)
