"""Which parameters share a flat buffer: those of one optimizer group, precision and set of ranks that sum their gradients.
Pure, so that what is planned and what is built cannot differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn

from tinytron.distributed.param_spec import ParamSpec


@dataclass(frozen=True)
class BufferGroup:
    """The parameters of one flat buffer with their specs, in registration order; ``whole_tensors``: ranks own whole
    matrices of it (Muon) instead of ranges of elements."""

    params: tuple[nn.Parameter, ...]
    specs: tuple[ParamSpec, ...]
    gradient_group: Literal["dense", "expert"]
    whole_tensors: bool


def group_parameters(
    params: Iterable[nn.Parameter], options: Mapping[str, Any], names: Mapping[int, str], specs: Mapping[str, ParamSpec]
) -> list[BufferGroup]:
    """The buffers of one optimizer group with ``options``, in the order of their first parameters.

    ``names`` maps each parameter's id to its name, in registration order; a name without a spec is a dense matrix.
    Parameters that need no gradient are left out.
    """
    order = {key: i for i, key in enumerate(names)}
    kinds: dict[tuple[torch.dtype, Literal["dense", "expert"]], list[tuple[nn.Parameter, ParamSpec]]] = {}
    for p in sorted((p for p in params if p.requires_grad), key=lambda p: order.get(id(p), 0)):
        name = names.get(id(p), "")
        spec = specs.get(name) or ParamSpec(name, tuple(p.shape), "matrix")
        kinds.setdefault((p.dtype, spec.gradient_group), []).append((p, spec))
    whole = options.get("kind") == "muon"
    return [
        BufferGroup(tuple(p for p, _ in members), tuple(spec for _, spec in members), gradient_group, whole)
        for (_, gradient_group), members in kinds.items()
    ]
