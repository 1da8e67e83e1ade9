"""Qwen3-MoE: Qwen3 with experts in some layers, and one sliding window in all of them."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options, Table
from tinytron.interop.families.shared import (
    DENSE,
    decoder_names,
    read_decoder,
    read_one_window,
    read_window,
    write_decoder,
)
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig

_EXPERTS: Table = {
    "router": ("mlp.gate",),
    "experts.gate_up_proj": ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
    "experts.down_proj": ("mlp.experts.{e}.down_proj",),
}


def _read(settings: Settings) -> Options:
    options = read_decoder(settings)
    window = read_window(settings)
    window = read_one_window(settings, window if settings.switch("use_sliding_window", False) else 0)
    settings.take("max_window_layers", None)  # older versions save it, but no version uses it
    # Version 5 of transformers renamed num_experts to num_local_experts.
    experts = settings.integer("num_local_experts", settings.integer("num_experts", 128))
    every, dense = settings.integer("decoder_sparse_step", 1), settings.integers("mlp_only_layers") or []
    if every < 1:
        raise settings.wrong("decoder_sparse_step", every, "at least 1 is expected")
    has_experts = [(layer + 1) % every == 0 and layer not in dense for layer in range(options["num_layer"])]
    return {
        **options,
        "intermediate_size": settings.integer("intermediate_size", 6144),
        "qk_norm": True,
        "attention_bias": settings.switch("attention_bias", False),
        "sliding_window": window,
        "use_moe": True,
        "num_experts": experts,
        "num_experts_per_tok": settings.integer("num_experts_per_tok", 8),
        "moe_intermediate_size": settings.integer("moe_intermediate_size", 768),
        "norm_topk_prob": settings.switch("norm_topk_prob", False),
        "dense_layers": tuple(layer for layer, has in enumerate(has_experts) if not has),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer in range(config.num_layer) if layer not in config.moe_layers]
    return {
        **write_decoder(config),
        "attention_bias": config.has_out_bias,
        "use_sliding_window": bool(config.window(0)),
        "sliding_window": config.window(0) or None,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "router_aux_loss_coef": config.moe_aux_loss_coef,
    }


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", decoder_names(DENSE | _EXPERTS), _read, _write)
