"""The specification of a parameter, for ZeRO, clipping, checkpoints, planning and conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn as nn

Kind = Literal["matrix", "router", "embedding", "head", "norm", "bias", "adapter"]


class Shard(NamedTuple):
    """A cut of a tensor: dimension ``dim`` of the global tensor is split into equal parts over mesh axis ``axis``."""

    axis: str
    dim: int


@dataclass(frozen=True)
class ParamSpec:
    """Facts about one parameter. The module that creates it states them, so no reader has to guess from a name.

    ``name`` is the key in ``state_dict``; ``shape`` is the shape of the global tensor (all experts).
    ``shards`` list the mesh axes and dimensions that the tensor is cut along (empty: every rank holds
    all of it). Together with the layout they determine the ranks that sum its gradient and share its
    optimizer state (``ParallelLayout.replicas``). ``stacked``: dimension 0 counts independent tensors
    (experts), and each is initialized and exported by its own index. ``writes_residual`` marks
    projections into the residual stream. ``row_blocks`` are the heights of separate matrices that are
    packed into this tensor (empty: it is a single matrix).
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    shards: tuple[Shard, ...] = ()
    stacked: bool = False
    writes_residual: bool = False
    row_blocks: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that the tensor is cut over, in alphabetical order."""
        return tuple(sorted({shard.axis for shard in self.shards}))

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return math.prod(self.shape)


def specs_of(model: nn.Module) -> list[ParamSpec]:
    """The result of ``model.param_specs()``. A module without that method gets default specs: unsharded, and a matrix if
    it has at least two dimensions."""
    if callable(own := getattr(model, "param_specs", None)):
        specs: list[ParamSpec] = own()
        return specs
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def kind(p: nn.Parameter) -> Kind:
        if id(p) in embeddings:
            return "embedding"
        return "matrix" if p.ndim >= 2 else "bias"

    return [ParamSpec(name, tuple(p.shape), kind(p)) for name, p in model.named_parameters()]
