"""Parameter groups of the optimizer: weight decay, learning-rate multiplier, and Muon or AdamW for each parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn as nn

from tinytron.distributed.param_spec import Kind, ParamSpec
from tinytron.errors import ConfigError

# The learning-rate class of each kind of parameter.
_LR_CLASS: dict[Kind, str] = {
    "matrix": "matrix",
    "router": "matrix",
    "embedding": "embedding",
    "head": "head",
    "norm": "scalar",
    "bias": "scalar",
    "adapter": "matrix",
}
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def parameter_groups(
    model: nn.Module,
    specs: Sequence[ParamSpec],
    weight_decay: float,
    *,
    decay_all: bool = False,
    decay_embeddings: bool = True,
    muon: bool = False,
    lr_mults: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    width_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups that cover every trainable parameter exactly once.

    Weight decay applies to matrices, adapters and the head, to embeddings with ``decay_embeddings``, and to norms and
    biases only with ``decay_all``. Each group has an ``lr_mult`` (from ``lr_mults`` by class: matrix, embedding, head,
    scalar; 1 if missing), by which the trainer multiplies the scheduled rate. It shrinks by ``layer_decay`` with every
    block below the last (see ``layer_rates``). For muP, ``width_mult`` divides the rate of AdamW's matrices and multiplies
    their weight decay, which is applied times the rate; Muon's updates need no such factor. With ``muon``, matrices except
    the router's get ``kind="muon"`` and their ``row_blocks``.
    """
    by_name = {spec.name: spec for spec in specs}
    rate_of = layer_rates(specs, layer_decay)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spec = by_name[name]
        decays = (
            decay_all
            or spec.kind in ("matrix", "router", "head", "adapter")
            or (spec.kind == "embedding" and decay_embeddings)
        )
        width = width_mult if spec.kind == "matrix" and not muon else 1.0
        options: dict[str, Any] = {
            "weight_decay": weight_decay * width if decays else 0.0,
            "lr_mult": (lr_mults or {}).get(_LR_CLASS[spec.kind], 1.0) * rate_of(spec) / width,
        }
        if muon:
            matrix = spec.kind == "matrix" and parameter.ndim >= 2
            options |= {"kind": "muon", "row_blocks": spec.row_blocks} if matrix else {"kind": "adamw"}
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


def layer_rates(specs: Sequence[ParamSpec], decay: float) -> Callable[[ParamSpec], float]:
    """The learning-rate multiplier of a parameter by its depth, as BEiT's fine-tuning has it (arXiv:2106.08254): 1 for the
    head and the final norm, ``decay`` for the last block, a further ``decay`` for each block below it and for the
    embeddings. The first number in a parameter's name is its block's. Raises: ConfigError if no name has a number."""
    blocks = {spec.name: int(found[1]) for spec in specs if (found := _BLOCK.search(spec.name))}
    if decay == 1:
        return lambda spec: 1.0
    if not blocks:
        raise ConfigError(
            f"--layer_lr_decay {decay} needs blocks with numbers in their parameters' names, such as blocks.0.mlp.weight, "
            f"but this model has {specs[0].name}; use 1"
        )
    top = max(blocks.values()) + 1

    def rate(spec: ParamSpec) -> float:
        below = top + 1 if spec.kind == "embedding" else top - blocks.get(spec.name, top)
        return decay**below

    return rate
