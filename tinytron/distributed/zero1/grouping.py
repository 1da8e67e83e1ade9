"""The grouping of parameters into flat buffers: by optimizer group, precision and the mesh axes that cut them. It is a pure
function, so the planner and the optimizer cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from tinytron.distributed.param_spec import ParamSpec
from tinytron.errors import ConfigError


@dataclass(frozen=True)
class BufferGroup:
    """The parameters of one flat buffer with their specs, in registration order. ``axes`` are the mesh axes that cut all of
    them. With ``whole_tensors`` ranks own whole matrices (for Muon) instead of ranges of elements."""

    params: tuple[nn.Parameter, ...]
    specs: tuple[ParamSpec, ...]
    axes: tuple[str, ...]
    whole_tensors: bool


def group_parameters(
    params: Iterable[nn.Parameter], options: Mapping[str, Any], names: Mapping[int, str], specs: Mapping[str, ParamSpec]
) -> list[BufferGroup]:
    """The buffers of one optimizer group with ``options``, in the order of their first parameters.

    ``names`` maps each parameter's id to its name, in registration order; a parameter without a spec counts as an unsharded
    matrix. Parameters that need no gradient are left out. Raises: ConfigError if Muon would get parts of matrices.
    """
    order = {key: i for i, key in enumerate(names)}
    whole = options.get("kind") == "muon"
    kinds: dict[tuple[torch.dtype, tuple[str, ...]], list[tuple[nn.Parameter, ParamSpec]]] = {}
    for p in sorted((p for p in params if p.requires_grad), key=lambda p: order.get(id(p), 0)):
        name = names.get(id(p), "")
        spec = specs.get(name) or ParamSpec(name, tuple(p.shape), "matrix")
        if whole and (cut := [shard for shard in spec.shards if shard.dim >= len(spec.shape) - 2]):
            raise ConfigError(
                f"Muon needs whole matrices, but dimension {cut[0].dim} of {name} is cut over {cut[0].axis}; "
                "use --optimizer adamw"
            )
        kinds.setdefault((p.dtype, spec.axes), []).append((p, spec))
    return [
        BufferGroup(tuple(p for p, _ in members), tuple(spec for _, spec in members), axes, whole)
        for (_, axes), members in kinds.items()
    ]
