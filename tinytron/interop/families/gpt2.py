"""GPT-2: learned positions, layer norms, biases everywhere, and weights stored transposed."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options, Table
from tinytron.interop.families.shared import GELU, MOST_LAYERS
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig

_NAMES: Table = {
    "wte": ("transformer.wte",),
    "wpe": ("transformer.wpe",),
    "blocks.{i}.attn_norm": ("transformer.h.{i}.ln_1",),
    "blocks.{i}.attn.qkv_proj": ("transformer.h.{i}.attn.c_attn",),
    "blocks.{i}.attn.out_proj": ("transformer.h.{i}.attn.c_proj",),
    "blocks.{i}.mlp_norm": ("transformer.h.{i}.ln_2",),
    "blocks.{i}.mlp.up_proj": ("transformer.h.{i}.mlp.c_fc",),
    "blocks.{i}.mlp.down_proj": ("transformer.h.{i}.mlp.c_proj",),
    "final_norm": ("transformer.ln_f",),
    "lm_head": ("lm_head",),
}


def _read(settings: Settings) -> Options:
    for key, works in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        settings.one_of(key, {works: works}, works)
    settings.one_of("reorder_and_upcast_attn", {False: False}, False)
    heads, width = settings.integer("n_head"), settings.integer("n_embd")
    return {
        "block_size": settings.integer("n_positions"),
        "vocab_size": settings.integer("vocab_size"),
        "num_layer": settings.integer("n_layer", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": width,
        "intermediate_size": settings.integer("n_inner", 4 * width),
        "mlp_type": settings.one_of("activation_function", GELU, "gelu_new"),
        "bias": True,
        "norm_type": "layer",
        "norm_eps": settings.number("layer_norm_epsilon", 1e-5),
        "position_type": "learned",
        "tied_lm_head": settings.switch("tie_word_embeddings", True),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layer,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": "gelu" if config.mlp_type == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_lm_head,
        "initializer_range": config.init_std,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _NAMES,
    _read,
    _write,
    base="transformer.",
    transposed=frozenset(module for module in _NAMES if module.endswith("_proj")),
    ignored=r"\.attn\.(bias|masked_bias)$",
)
