"""The token embedding, and the table of rotary position embeddings (RoPE)."""

from __future__ import annotations

import torch
import torch.nn as nn

from tinytron.kernels.embedding import embedding
from tinytron.kernels.rope import Rotation


class TokenEmbedding(nn.Embedding):
    """An embedding ``weight[ids]`` whose gradient is summed in fp32: ``[...] -> [..., D]``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(self.weight, ids)


class RotaryEmbedding(nn.Module):
    """The table of RoPE angles for positions ``0 .. block_size - 1``, computed once (arXiv:2104.09864,
    section 3.4.2).

    ``frequencies`` ``[R/2]`` are in radians per position; cosines and sines are multiplied by ``scale``.
    The table is not in ``state_dict``, because it is a function of the configuration.
    """

    def __init__(self, frequencies: torch.Tensor, block_size: int, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        # Computed in float64: at position 4095 an fp32 angle is already off by 1e-4.
        angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies.double())
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", (angles.cos() * scale).to(dtype).unsqueeze(1), persistent=False)
        self.register_buffer("sin", (angles.sin() * scale).to(dtype).unsqueeze(1), persistent=False)

    def forward(self, first: int, count: int, positions: torch.Tensor | None = None) -> Rotation:
        """The rotations of ``count`` positions starting at ``first``, or of ``positions`` ``[S]`` or ``[B, S]``."""
        if positions is None:
            return Rotation(self.cos[first : first + count], self.sin[first : first + count])
        return Rotation(self.cos[positions], self.sin[positions])
