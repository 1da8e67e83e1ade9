"""Folds the multipliers of muP (``--mup_base_width``) into the weights, for formats that have no multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tinytron.model import ModelConfig


def folded_config(config: ModelConfig) -> ModelConfig:
    """``config`` without multipliers: the architecture of a model whose weights are folded."""
    return replace(config, mup_base_width=0)


def folded_weights(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` with which ``folded_config(config)`` computes the same, up to rounding in their precision (none where the
    multipliers are powers of two). The factor on the output goes into the final norm; the factor on queries goes into their
    norm, if they have one, or into the rows of the projection that make them."""
    if not config.mup_base_width:
        return dict(weights)
    rows = config.num_attention_heads * config.resolved_head_dim

    def fold(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name.startswith("final_norm."):
            return weight * config.output_scale
        if ".q_norm." in name:
            return weight * config.query_scale
        if ".qkv_proj." in name and not config.qk_norm:
            return torch.cat((weight[:rows] * config.query_scale, weight[rows:]))
        return weight

    return {name: fold(name, weight) for name, weight in weights.items()}
