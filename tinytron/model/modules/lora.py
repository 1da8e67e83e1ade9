"""A low-rank adapter of a linear layer (LoRA, arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F


class LowRank(nn.Module):
    """``alpha / rank * B A x``, which is added to the output of ``layer``: ``[..., in] -> [..., out]``.

    If the layer packs several projections (``row_blocks``), each of the ``adapted`` ones has its own A and B, as in models
    that keep them apart: ``a`` is ``[n rank, in]``, ``b`` has their rows, ``[rows, rank]``, and ``ranges`` ``[n, 2]`` are
    their first and last rows (exclusive) in the layer's weight. B is zero at the start, so the layer's output does not
    change. ``scale`` and ``ranges`` are in the state, from which the adapter can thus be merged into the weight.
    """

    scale: torch.Tensor
    ranges: torch.Tensor

    def __init__(self, layer: nn.Linear, adapted: Sequence[int], rank: int, alpha: float) -> None:
        super().__init__()
        self.blocks = row_blocks(layer)
        self.adapted, self.rank, self.factor = tuple(adapted), rank, alpha / rank
        self.enabled = True
        device = layer.weight.device
        self.a = nn.Parameter(layer.weight.new_zeros(len(adapted) * rank, layer.in_features))
        self.b = nn.Parameter(layer.weight.new_zeros(sum(self.blocks[i] for i in adapted), rank))
        ranges = [(sum(self.blocks[:i]), sum(self.blocks[: i + 1])) for i in adapted]
        self.register_buffer("scale", torch.tensor(self.factor, dtype=torch.float64, device=device))
        self.register_buffer("ranges", torch.tensor(ranges, dtype=torch.int64, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, self.a) * self.factor
        heights = [self.blocks[i] for i in self.adapted]
        outs = [F.linear(part, b) for part, b in zip(low.split(self.rank, -1), self.b.split(heights), strict=True)]
        if len(self.blocks) == 1:
            return outs[0]
        by_block = dict(zip(self.adapted, outs, strict=True))
        parts = [
            by_block[i] if i in by_block else low.new_zeros(*x.shape[:-1], height)
            for i, height in enumerate(self.blocks)
        ]
        return torch.cat(parts, -1)


def row_blocks(layer: nn.Linear) -> tuple[int, ...]:
    """The output sizes of the projections that ``layer`` packs; one for a plain layer."""
    blocks: tuple[int, ...] = getattr(layer, "row_blocks", (layer.out_features,))
    return blocks


def add_low_rank(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """A forward hook that adds the adapter ``layer.lora`` to the layer's ``output``."""
    adapter = layer.lora
    assert isinstance(adapter, LowRank), "the hook is registered with the adapter"
    return output + adapter(inputs[0]) if adapter.enabled else output
