"""GPT-NeoX and Pythia: attention and feed-forward in parallel, rotary positions for part of each head."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options, Table
from tinytron.interop.families.shared import GELU, read_rope, read_sizes, write_rope_scaling, write_sizes
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig

_NAMES: Table = {
    "wte": ("gpt_neox.embed_in",),
    "blocks.{i}.attn_norm": ("gpt_neox.layers.{i}.input_layernorm",),
    "blocks.{i}.attn.qkv_proj": ("gpt_neox.layers.{i}.attention.query_key_value",),
    "blocks.{i}.attn.out_proj": ("gpt_neox.layers.{i}.attention.dense",),
    "blocks.{i}.mlp_norm": ("gpt_neox.layers.{i}.post_attention_layernorm",),
    "blocks.{i}.mlp.up_proj": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h",),
    "blocks.{i}.mlp.down_proj": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",),
    "final_norm": ("gpt_neox.final_layer_norm",),
    "lm_head": ("embed_out",),
}


def _read(settings: Settings) -> Options:
    sizes = read_sizes(settings)
    theta, fraction = settings.number("rotary_emb_base", 10000.0), settings.number("rotary_pct", 0.25)
    rope = read_rope(settings, sizes["block_size"], theta, fraction)
    # Version 4 of transformers also saves both under a second name, but reads only the first.
    settings.agree("rope_theta", rope["rope_theta"])
    settings.agree("partial_rotary_factor", rope["rotary_fraction"])
    return {
        **sizes,
        **rope,
        "intermediate_size": settings.integer("intermediate_size"),
        "mlp_type": settings.one_of("hidden_act", GELU, "gelu"),
        "mlp_bias": True,
        "attention_bias": settings.switch("attention_bias", True),
        "norm_type": "layer",
        "norm_eps": settings.number("layer_norm_eps", 1e-5),
        "parallel_residual": settings.switch("use_parallel_residual", True),
        "tied_lm_head": settings.switch("tie_word_embeddings", False),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu" if config.mlp_type == "gelu" else "gelu_new",
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.has_out_bias,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_scaling": write_rope_scaling(config),
    }


FAMILY = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _NAMES,
    _read,
    _write,
    base="gpt_neox.",
    by_head=frozenset({"blocks.{i}.attn.qkv_proj"}),
    ignored=r"\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$",
)
