"""A parameter's passport: what ZeRO, clipping, checkpoints, planning and conversion need to know about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn as nn

Kind = Literal["matrix", "router", "embedding", "head", "norm", "bias"]


class Shard(NamedTuple):
    """A cut: dimension ``dim`` of the global tensor is spread, in equal parts, over mesh axis ``axis``."""

    axis: str
    dim: int


@dataclass(frozen=True)
class ParamSpec:
    """Facts about one parameter, stated by the module that creates it; no reader guesses from a name.

    ``name`` is the key in ``state_dict``; ``shape`` is that of the global tensor (all experts), and
    ``shards`` say along which mesh axes and dimensions it is cut (empty: every rank holds all of
    it). Which ranks sum its gradient and share its optimizer state follows from them and the layout
    (``ParallelLayout.replicas``). ``stacked``: dimension 0 counts tensors that have nothing to do
    with each other (experts), each initialized and exported by its own index. ``writes_residual``
    marks projections into the residual stream; ``row_blocks`` are the heights of separate matrices
    packed into one (empty: it is one).
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
        """The mesh axes that it is cut over, in alphabetical order."""
        return tuple(sorted({shard.axis for shard in self.shards}))

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return math.prod(self.shape)


def specs_of(model: nn.Module) -> list[ParamSpec]:
    """``model.param_specs()``, or for a foreign module the plain facts: matrices by dimension, not sharded."""
    if callable(own := getattr(model, "param_specs", None)):
        specs: list[ParamSpec] = own()
        return specs
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def kind(p: nn.Parameter) -> Kind:
        if id(p) in embeddings:
            return "embedding"
        return "matrix" if p.ndim >= 2 else "bias"

    return [ParamSpec(name, tuple(p.shape), kind(p)) for name, p in model.named_parameters()]
