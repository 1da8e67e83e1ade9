"""A parameter's passport: what ZeRO, clipping, checkpoints, planning and conversion need to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn as nn

Kind = Literal["matrix", "router", "embedding", "head", "norm", "bias"]


@dataclass(frozen=True)
class ParamSpec:
    """Facts about one parameter, stated by the module that creates it; nobody guesses from a name.

    ``name`` is the key in ``state_dict``; ``shape`` is global (all experts); ``shard_axis`` is the dimension that expert
    parallelism cuts, ``None`` when every rank holds the whole tensor; ``gradient_group`` names the ranks its gradient is
    summed over: ``dense`` is the world, ``expert`` the expert-data-parallel group. ``writes_residual`` marks projections
    into the residual stream; ``row_blocks`` are the heights of separate matrices packed into one (empty: it is one).
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    gradient_group: Literal["dense", "expert"] = "dense"
    shard_axis: int | None = None
    writes_residual: bool = False
    row_blocks: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def specs_of(model: nn.Module) -> list[ParamSpec]:
    """``model.param_specs()``, or for a foreign module the plain facts: matrices by dimension, dense, not sharded."""
    if callable(own := getattr(model, "param_specs", None)):
        specs: list[ParamSpec] = own()
        return specs
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def kind(p: nn.Parameter) -> Kind:
        if id(p) in embeddings:
            return "embedding"
        return "matrix" if p.ndim >= 2 else "bias"

    return [ParamSpec(name, tuple(p.shape), kind(p)) for name, p in model.named_parameters()]
