"""Our options as a config.json of each family. What a family cannot say is left out: whoever reads it back sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinytron.model.config import ModelConfig


def _write_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layer,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tied_lm_head,
        "initializer_range": config.init_std,
    }


def _write_scaling(config: ModelConfig) -> dict[str, Any] | None:
    kind = config.rope_scaling
    if kind == "none" or config.position_type != "rotary":
        return None
    written: dict[str, Any] = {"rope_type": kind, "factor": config.rope_scaling_factor}
    if kind != "linear":
        written["original_max_position_embeddings"] = config.rope_original_block_size
    if kind == "llama3":
        written |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    if kind == "yarn":
        written |= {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
        if config.rope_attention_factor is not None:
            written["attention_factor"] = config.rope_attention_factor
    return written


def _write_decoder(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sizes(config),
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.resolved_head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_scaling(config),
        "attention_dropout": 0.0,
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.has_out_bias, "mlp_bias": config.has_mlp_bias}
    return {**_write_decoder(config), **biases}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_write_decoder(config), "sliding_window": config.window(0) or None}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window(layer) for layer in range(config.num_layer)]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": config.sliding_window or None,
        "max_window_layers": next((layer for layer, window in enumerate(windows) if window), config.num_layer),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {**_write_decoder(config), **_write_windows(config)}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_decoder(config), **_write_windows(config), "attention_bias": config.has_out_bias}


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_decoder(config),
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.window(0) or None,
        "router_aux_loss_coef": config.moe_aux_loss_coef,
    }


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer in range(config.num_layer) if layer not in config.moe_layers]
    return {
        **_write_decoder(config),
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


def _write_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sizes(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu" if config.mlp_type == "gelu" else "gelu_new",
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.has_out_bias,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_scaling": _write_scaling(config),
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
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


# In the order of preference, where several can say the same.
WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_qwen2,
    "qwen3": _write_qwen3,
    "mixtral": _write_mixtral,
    "qwen3_moe": _write_qwen3_moe,
    "gpt_neox": _write_neox,
    "gpt2": _write_gpt2,
}
