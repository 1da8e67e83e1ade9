"""Which parameters get weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn

from tinytron.distributed.param_spec import ParamSpec


def decay_groups(
    model: nn.Module, specs: Sequence[ParamSpec], weight_decay: float, *, decay_all: bool, decay_embeddings: bool
) -> list[dict[str, Any]]:
    """Two optimizer groups, decayed and not; norms and biases are not, embeddings by choice, ``decay_all`` takes all.

    Covers every trainable parameter exactly once; an empty group is left out.
    """
    kinds = {spec.name: spec.kind for spec in specs}

    def decays(name: str) -> bool:
        kind = kinds[name]
        return decay_all or kind in ("matrix", "head") or (kind == "embedding" and decay_embeddings)

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if decays(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
