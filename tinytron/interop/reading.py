"""A config.json of each family as options of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tinytron.interop.settings import Settings

Options = dict[str, Any]
_SILU = {"silu": "swiglu", "swish": "swiglu"}
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_MOST_LAYERS = 10_000  # a number beyond is damage


def _sizes(settings: Settings) -> Options:
    """What all families but GPT-2 name alike."""
    heads = settings.integer("num_attention_heads")
    return {
        "block_size": settings.integer("max_position_embeddings"),
        "vocab_size": settings.integer("vocab_size"),
        "num_layer": settings.integer("num_hidden_layers", most=_MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("num_key_value_heads", heads),
        "hidden_size": settings.integer("hidden_size"),
        "head_dim": settings.integer("head_dim", None),
    }


def _decoder(settings: Settings, *, theta: float = 10000.0, eps: float = 1e-6) -> Options:
    """Llama, and what its successors share with it."""
    sizes = _sizes(settings)
    return {
        **sizes,
        "mlp_type": settings.one_of("hidden_act", _SILU, "silu"),
        "norm_eps": settings.number("rms_norm_eps", eps),
        "tied_lm_head": settings.switch("tie_word_embeddings", False),
        **_rope(settings, sizes["block_size"], settings.number("rope_theta", theta), 1.0),
    }


def _rope(settings: Settings, block_size: int, theta: float, fraction: float) -> Options:
    """Rotary positions, as before version 5 (``rope_theta`` and ``rope_scaling``) or since (``rope_parameters``)."""
    table = settings.table("rope_parameters") or settings.table("rope_scaling")
    settings.take("rope_scaling", None)
    if table is None:
        return {"rope_theta": theta, "rotary_fraction": fraction}
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    kind = table.one_of("rope_type" if table.has("rope_type") else "type", kinds, "default")
    table.take("type", None)
    options: Options = {"rope_theta": table.number("rope_theta", theta), "rope_scaling": kind}
    options["rotary_fraction"] = table.number("partial_rotary_factor", fraction)
    if kind != "none":
        options["rope_scaling_factor"] = table.number("factor")
    if kind in ("llama3", "yarn"):
        options["rope_original_block_size"] = table.integer("original_max_position_embeddings", block_size)
    if kind == "llama3":
        options["rope_low_freq_factor"] = table.number("low_freq_factor")
        options["rope_high_freq_factor"] = table.number("high_freq_factor")
    if kind == "yarn":
        options["rope_beta_fast"] = table.number("beta_fast", 32.0)
        options["rope_beta_slow"] = table.number("beta_slow", 1.0)
        options["rope_attention_factor"] = _attention_factor(table, options["rope_scaling_factor"])
        table.one_of("truncate", {True: True}, True)
    table.finish("rotary positions")
    return options


def _attention_factor(table: Settings, factor: float) -> float | None:
    given, over, under = (table.number(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (over and under) or factor <= 1:
        return given
    return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)


def _window(settings: Settings) -> int:
    """0 where it is null; where nothing is said transformers takes 4096."""
    window: int = settings.integer("sliding_window", 0 if settings.has("sliding_window") else 4096)
    return window


def _windows(settings: Settings, num_layer: int) -> Options:
    """Qwen's: switched by ``use_sliding_window``, for the layers that ``layer_types`` names, or else those from
    ``max_window_layers`` on."""
    window = _window(settings)
    first, types = settings.integer("max_window_layers", 28), settings.texts("layer_types")
    known = {"full_attention": False, "sliding_attention": True}
    if types is not None and (len(types) != num_layer or not known.keys() >= set(types)):
        raise settings.wrong("layer_types", types, f"{num_layer} of {' and '.join(known)} are expected")
    if not settings.switch("use_sliding_window", False):
        if "sliding_attention" in (types or []):
            raise settings.wrong("layer_types", types, "use_sliding_window is false")
        return {}
    chosen = [layer >= first for layer in range(num_layer)] if types is None else [known[kind] for kind in types]
    if not any(chosen) or not window:
        return {}
    layers = () if all(chosen) else tuple(layer for layer, is_chosen in enumerate(chosen) if is_chosen)
    return {"sliding_window": window, "sliding_window_layers": layers}


def _read_llama(settings: Settings) -> Options:
    settings.one_of("pretraining_tp", {1: 1}, 1)
    return {
        **_decoder(settings),
        "intermediate_size": settings.integer("intermediate_size"),
        "attention_bias": settings.switch("attention_bias", False),
        "mlp_bias": settings.switch("mlp_bias", False),
    }


def _read_mistral(settings: Settings) -> Options:
    options = {**_decoder(settings), "intermediate_size": settings.integer("intermediate_size")}
    return options | {"sliding_window": _window(settings)}


def _read_qwen2(settings: Settings) -> Options:
    options = {**_decoder(settings), "intermediate_size": settings.integer("intermediate_size"), "qkv_bias": True}
    return options | _windows(settings, options["num_layer"])


def _read_qwen3(settings: Settings) -> Options:
    options = {**_decoder(settings), "intermediate_size": settings.integer("intermediate_size"), "qk_norm": True}
    options |= {"attention_bias": settings.switch("attention_bias", False)} | _windows(settings, options["num_layer"])
    return options | {"head_dim": options["head_dim"] or 128}  # what transformers takes where nothing is said


def _read_mixtral(settings: Settings) -> Options:
    settings.one_of("router_jitter_noise", {0: 0}, 0)
    width = settings.integer("intermediate_size")
    return {
        **_decoder(settings, theta=1e6, eps=1e-5),
        "intermediate_size": width,  # of no layer
        "sliding_window": settings.integer("sliding_window", 0),
        "use_moe": True,
        "num_experts": settings.integer("num_local_experts", 8),
        "num_experts_per_tok": settings.integer("num_experts_per_tok", 2),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def _read_qwen3_moe(settings: Settings) -> Options:
    options = _decoder(settings)
    window = _window(settings)
    settings.take("max_window_layers", None)  # saved by older versions, used by none
    experts = settings.integer("num_local_experts", settings.integer("num_experts", 128))  # since version 5, before
    every, dense = settings.integer("decoder_sparse_step", 1), settings.integers("mlp_only_layers") or []
    if every < 1:
        raise settings.wrong("decoder_sparse_step", every, "at least 1 is expected")
    has_experts = [(layer + 1) % every == 0 and layer not in dense for layer in range(options["num_layer"])]
    return {
        **options,
        "intermediate_size": settings.integer("intermediate_size", 6144),
        "qk_norm": True,
        "attention_bias": settings.switch("attention_bias", False),
        "sliding_window": window if settings.switch("use_sliding_window", False) else 0,
        "use_moe": True,
        "num_experts": experts,
        "num_experts_per_tok": settings.integer("num_experts_per_tok", 8),
        "moe_intermediate_size": settings.integer("moe_intermediate_size", 768),
        "norm_topk_prob": settings.switch("norm_topk_prob", False),
        "dense_layers": tuple(layer for layer, has in enumerate(has_experts) if not has),
    }


def _read_neox(settings: Settings) -> Options:
    sizes = _sizes(settings)
    theta, fraction = settings.number("rotary_emb_base", 10000.0), settings.number("rotary_pct", 0.25)
    return {
        **sizes,
        "intermediate_size": settings.integer("intermediate_size"),
        "mlp_type": settings.one_of("hidden_act", _GELU, "gelu"),
        "mlp_bias": True,
        "attention_bias": settings.switch("attention_bias", True),
        "norm_type": "layer",
        "norm_eps": settings.number("layer_norm_eps", 1e-5),
        "parallel_residual": settings.switch("use_parallel_residual", True),
        "tied_lm_head": settings.switch("tie_word_embeddings", False),
        **_rope(settings, sizes["block_size"], theta, fraction),
    }


def _read_gpt2(settings: Settings) -> Options:
    for key, works in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        settings.one_of(key, {works: works}, works)
    settings.one_of("reorder_and_upcast_attn", {False: False}, False)
    heads, width = settings.integer("n_head"), settings.integer("n_embd")
    return {
        "block_size": settings.integer("n_positions"),
        "vocab_size": settings.integer("vocab_size"),
        "num_layer": settings.integer("n_layer", most=_MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": width,
        "intermediate_size": settings.integer("n_inner", 4 * width),
        "mlp_type": settings.one_of("activation_function", _GELU, "gelu_new"),
        "bias": True,
        "norm_type": "layer",
        "norm_eps": settings.number("layer_norm_epsilon", 1e-5),
        "position_type": "learned",
        "tied_lm_head": settings.switch("tie_word_embeddings", True),
    }


READERS: dict[str, Callable[[Settings], Options]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "mixtral": _read_mixtral,
    "qwen3_moe": _read_qwen3_moe,
    "gpt_neox": _read_neox,
    "gpt2": _read_gpt2,
}
