"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options, Table
from tinytron.interop.families.shared import decoder_names, read_decoder, read_one_window, write_decoder
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig

_EXPERTS: Table = {
    "router": ("block_sparse_moe.gate",),
    "experts.gate_up_proj": ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
    "experts.down_proj": ("block_sparse_moe.experts.{e}.w2",),
}


def _read(settings: Settings) -> Options:
    settings.one_of("router_jitter_noise", {0: 0}, 0)
    width = settings.integer("intermediate_size")
    return {
        **read_decoder(settings, theta=1e6, eps=1e-5),
        "intermediate_size": width,  # no layer uses it
        "sliding_window": read_one_window(settings, settings.integer("sliding_window", 0)),
        "use_moe": True,
        "num_experts": settings.integer("num_local_experts", 8),
        "num_experts_per_tok": settings.integer("num_experts_per_tok", 2),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.window(0) or None,
        "router_aux_loss_coef": config.moe_aux_loss_coef,
    }


FAMILY = Family("mixtral", "MixtralForCausalLM", decoder_names(_EXPERTS), _read, _write)
