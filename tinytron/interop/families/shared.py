"""Names and settings that several families share: sizes, rotary positions, windows, and Llama's decoder."""

from __future__ import annotations

import math
from typing import Any

from tinytron.interop.families.family import Options, Table
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig

GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
MOST_LAYERS = 10_000  # a larger number means a damaged file
_SILU = {"silu": "swiglu", "swish": "swiglu"}

# Llama's decoder, which most families adopted.

DENSE: Table = {"gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"), "down_proj": ("mlp.down_proj",)}


def decoder_names(feed_forward: Table) -> Table:
    """The table of a decoder; ``feed_forward`` has the names of modules in a layer's ``mlp``, relative to the layer."""
    layer = "model.layers.{i}."
    attention = f"{layer}self_attn."
    return {
        "wte": ("model.embed_tokens",),
        "blocks.{i}.attn_norm": (f"{layer}input_layernorm",),
        "blocks.{i}.attn.qkv_proj": (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
        "blocks.{i}.attn.q_norm": (f"{attention}q_norm",),
        "blocks.{i}.attn.k_norm": (f"{attention}k_norm",),
        "blocks.{i}.attn.out_proj": (f"{attention}o_proj",),
        "blocks.{i}.mlp_norm": (f"{layer}post_attention_layernorm",),
        **{f"blocks.{{i}}.mlp.{ours}": tuple(layer + name for name in theirs) for ours, theirs in feed_forward.items()},
        "final_norm": ("model.norm",),
        "lm_head": ("lm_head",),
    }


def read_decoder(settings: Settings, *, theta: float = 10000.0, eps: float = 1e-6) -> Options:
    """All options but biases, windows and feed-forward width; ``theta`` and ``eps`` are the family's defaults."""
    sizes = read_sizes(settings)
    rope = read_rope(settings, sizes["block_size"], settings.number("rope_theta", theta), 1.0)
    settings.agree("partial_rotary_factor", 1.0)
    if rope["rotary_fraction"] != 1.0:
        raise settings.wrong("partial_rotary_factor", rope["rotary_fraction"], "this family rotates whole heads")
    return {
        **sizes,
        **rope,
        "mlp_type": settings.one_of("hidden_act", _SILU, "silu"),
        "norm_eps": settings.number("rms_norm_eps", eps),
        "tied_lm_head": settings.switch("tie_word_embeddings", False),
    }


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """The keys that ``read_decoder`` reads, and the width of a dense feed-forward layer."""
    return {
        **write_sizes(config),
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.resolved_head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": write_rope_scaling(config),
        "attention_dropout": 0.0,
    }


# Sizes, under the names that all families but GPT-2 use.


def read_sizes(settings: Settings) -> Options:
    """Vocabulary, layers, heads and widths."""
    heads = settings.integer("num_attention_heads")
    return {
        "block_size": settings.integer("max_position_embeddings"),
        "vocab_size": settings.integer("vocab_size"),
        "num_layer": settings.integer("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("num_key_value_heads", heads),
        "hidden_size": settings.integer("hidden_size"),
        "head_dim": settings.integer("head_dim", None),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    """The keys that ``read_sizes`` reads, without the key-value heads, and two more that all families have."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layer,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tied_lm_head,
        "initializer_range": config.init_std,
    }


# Rotary positions.


def read_rope(settings: Settings, block_size: int, theta: float, fraction: float) -> Options:
    """Rotary positions, from the keys before version 5 of transformers (``rope_theta`` and ``rope_scaling``) or since
    (``rope_parameters``). ``theta`` and ``fraction`` are the defaults for missing keys."""
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
    for key in (
        "original_max_position_embeddings",
        "finetuned",
    ):  # some models have them for kinds that do not use them
        table.take(key, None)
    table.finish("rotary positions", strict=True)
    return options


def _attention_factor(table: Settings, factor: float) -> float | None:
    given, over, under = (table.number(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (over and under) or factor <= 1:
        return given
    return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)


def write_rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """The value of ``rope_scaling``; null without scaling."""
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


# Sliding windows.


def read_window(settings: Settings) -> int:
    """``sliding_window``: 0 if it is null; transformers' default of 4096 if the key is missing."""
    window: int = settings.integer("sliding_window", 0 if settings.has("sliding_window") else 4096)
    return window


def read_one_window(settings: Settings, window: int) -> int:
    """``window``, after checking that ``layer_types`` agrees, for families with one window in all layers."""
    types = settings.texts("layer_types")
    kind = "sliding_attention" if window else "full_attention"
    if types is not None and set(types) != {kind}:
        raise settings.wrong("layer_types", types, f"only {kind} fits the other settings")
    return window


def read_qwen_windows(settings: Settings, num_layer: int) -> Options:
    """Qwen's windows: enabled by ``use_sliding_window``, for the layers that ``layer_types`` names, or else for all layers
    from ``max_window_layers`` on."""
    window = read_window(settings)
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


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    """The keys that ``read_qwen_windows`` reads; older versions of transformers need ``max_window_layers``."""
    windows = [config.window(layer) for layer in range(config.num_layer)]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": config.sliding_window or None,
        "max_window_layers": next((layer for layer, window in enumerate(windows) if window), config.num_layer),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }
