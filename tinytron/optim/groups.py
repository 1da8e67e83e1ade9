"""Parameter groups of the optimizer: weight decay, learning-rate multiplier, and Muon or AdamW for each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn

from tinytron.distributed.param_spec import Kind, ParamSpec

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


def parameter_groups(
    model: nn.Module,
    specs: Sequence[ParamSpec],
    weight_decay: float,
    *,
    decay_all: bool = False,
    decay_embeddings: bool = True,
    muon: bool = False,
    lr_mults: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups that cover every trainable parameter exactly once.

    Weight decay applies to matrices, adapters and the head, to embeddings with ``decay_embeddings``, and to norms and
    biases only with ``decay_all``. Each group has an ``lr_mult`` (from ``lr_mults`` by class: matrix, embedding, head,
    scalar; 1 if missing), by which the trainer multiplies the scheduled rate. With ``muon``, matrices except the router's
    get ``kind="muon"`` and their ``row_blocks``.
    """
    by_name = {spec.name: spec for spec in specs}
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
        options: dict[str, Any] = {
            "weight_decay": weight_decay if decays else 0.0,
            "lr_mult": (lr_mults or {}).get(_LR_CLASS[spec.kind], 1.0),
        }
        if muon:
            matrix = spec.kind == "matrix" and parameter.ndim >= 2
            options |= {"kind": "muon", "row_blocks": spec.row_blocks} if matrix else {"kind": "adamw"}
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())
