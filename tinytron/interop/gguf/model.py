"""Translates Tinytron's architecture and weights to llama.cpp's names, settings and row order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tinytron.distributed.param_spec import ParamSpec
from tinytron.errors import ConfigError
from tinytron.model.config import ModelConfig
from tinytron.model.modules.rope import rotary_frequencies

# Our names inside a block, and llama.cpp's. Several of its tensors are consecutive blocks of rows of one of ours.
_IN_BLOCK = {
    "attn_norm": ("attn_norm",),
    "attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "attn.q_norm": ("attn_q_norm",),
    "attn.k_norm": ("attn_k_norm",),
    "attn.out_proj": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.router": ("ffn_gate_inp",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "final_norm": "output_norm", "lm_head": "output"}
_FULL = re.compile(r"norm|bias|ffn_gate_inp|position_embd|rope_freqs")  # llama.cpp computes with these in fp32


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp. ``interleaved``: rotary positions rotate neighboring elements, so rows of queries and
    keys are reordered. ``fused``: queries, keys and values are one tensor. ``own_head``: a tied head is stored a second
    time. ``freq_factors``: every pair may have its own factor (Llama 3)."""

    name: str
    interleaved: bool = False
    fused: bool = False
    own_head: bool = False
    freq_factors: bool = False


_LLAMA = Architecture("llama", interleaved=True, freq_factors=True)
ARCHITECTURES: dict[str, Architecture] = {  # by model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gpt_neox": Architecture("gptneox", fused=True, own_head=True),
    "gpt2": Architecture("gpt2", fused=True),
}


class Tensor(NamedTuple):
    """A tensor of llama.cpp: its ``name``, the ``view`` of ours with its elements in its order, and whether it is kept in
    fp32 (``full``) whatever the type of the file."""

    name: str
    view: torch.Tensor
    full: bool


def architecture_for(model_type: str, config: ModelConfig) -> Architecture:
    """The llama.cpp architecture that computes the same as a model of the family ``model_type``. Raises: ConfigError naming
    an option that it lacks."""
    found = ARCHITECTURES.get(model_type)
    if found is None:
        raise ConfigError(
            f"--gguf: llama.cpp does not support the family {model_type}; supported are {', '.join(ARCHITECTURES)}; "
            "export a Hugging Face folder instead"
        )
    for value, rule in _lacking(found, config):
        raise ConfigError(f"--gguf: {value}, but llama.cpp's {found.name} {rule}; export a Hugging Face folder instead")
    return found


def _lacking(found: Architecture, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Pairs of a model option that llama.cpp's architecture lacks, and the rule of that architecture."""
    windows = {window for layer in range(config.num_layer) if (window := config.window(layer))}
    if windows and min(windows) < config.block_size:
        yield f"--sliding_window {min(windows)}", f"supports no window below --block_size {config.block_size}"
    scaling = config.rope_scaling
    if scaling == "llama3" and not found.freq_factors:
        yield f"--rope_scaling {scaling}", "supports none, linear and yarn"
    if scaling == "yarn":
        for name, works in (("rope_beta_fast", 32.0), ("rope_beta_slow", 1.0), ("rope_attention_factor", None)):
            if (value := getattr(config, name)) != works:
                yield f"--{name} {value}", f"supports only {'its default' if works is None else works}"
    wide = config.num_attention_heads * config.resolved_head_dim
    if found.name == "qwen2" and wide != config.hidden_size:
        yield (
            f"--head_dim {config.resolved_head_dim} of {config.num_attention_heads} heads",
            f"needs heads whose widths add up to --hidden_size {config.hidden_size}",
        )
    if found.name in ("qwen3", "qwen3moe") and config.has_qkv_bias:
        yield "--attention_bias", "has no biases"
    if found.name == "gptneox" and not config.has_out_bias:
        yield "--no-attention_bias", "needs biases in all projections"
    if found.name == "qwen3moe":
        if not config.norm_topk_prob:
            yield "--no-norm_topk_prob", "always divides the chosen scores by their sum (--norm_topk_prob)"
        if dense := [layer for layer in range(config.num_layer) if layer not in config.moe_layers]:
            yield f"layer {dense[0]} has no experts", "needs experts in every layer (--first_k_dense 0)"


def model_metadata(found: Architecture, config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The metadata keys of the model: whole numbers, floats, texts and switches."""
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context_length": config.block_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layer,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.resolved_head_dim,
        "attention.value_length": config.resolved_head_dim,
    }
    norm = "attention.layer_norm_rms_epsilon" if config.norm_type == "rms" else "attention.layer_norm_epsilon"
    values[norm] = float(config.norm_eps)
    if config.position_type == "rotary":
        values |= {"rope.dimension_count": config.rotary_dim, "rope.freq_base": float(config.rope_theta)}
        values |= _scaling(config)
    if found.name == "gptneox":
        values["use_parallel_residual"] = config.parallel_residual
    if config.use_moe:
        values |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        width = "feed_forward_length" if found.name == "llama" else "expert_feed_forward_length"
        values[width] = config.moe_intermediate_size
    return {f"{found.name}.{key}": value for key, value in values.items()}


def _scaling(config: ModelConfig) -> dict[str, Any]:
    """Keys for stretched positions; Llama 3's scaling is stored as a tensor instead."""
    if config.rope_scaling not in ("linear", "yarn"):
        return {}
    values: dict[str, Any] = {
        "rope.scaling.type": config.rope_scaling,
        "rope.scaling.factor": float(config.rope_scaling_factor),
    }
    if config.rope_scaling == "yarn":
        values["rope.scaling.original_context_length"] = config.rope_original_block_size
    return values


def tensors(
    found: Architecture,
    config: ModelConfig,
    specs: list[ParamSpec],
    weights: Mapping[str, torch.Tensor],
    vocab_size: int,
) -> Iterator[Tensor]:
    """All tensors of the file, as views of ``weights``. Rows after the first ``vocab_size`` ids have no token and are left
    out."""
    if config.rope_scaling == "llama3":
        scaled, _ = rotary_frequencies(config)
        half = config.rotary_dim // 2
        plain = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        yield Tensor("rope_freqs.weight", plain / scaled, True)
    for spec in specs:
        yield from _of_spec(found, config, spec, weights[spec.name], vocab_size)
    if found.own_head and config.tied_lm_head:
        yield Tensor("output.weight", weights["wte.weight"][:vocab_size], False)


def _of_spec(
    found: Architecture, config: ModelConfig, spec: ParamSpec, ours: torch.Tensor, vocab_size: int
) -> Iterator[Tensor]:
    module, kind = (spec.name, "weight") if spec.stacked else spec.name.rsplit(".", 1)
    if module in _OUTSIDE:
        name = f"{_OUTSIDE[module]}.{kind}"
        yield Tensor(name, ours[:vocab_size] if module in ("wte", "lm_head") else ours, bool(_FULL.search(name)))
        return
    _, layer, inner = module.split(".", 2)
    theirs = ("attn_qkv",) if found.fused and inner == "attn.qkv_proj" else _IN_BLOCK[inner]
    views = (ours,) if len(theirs) == 1 else ours.split(spec.row_blocks, dim=1 if spec.stacked else 0)
    for name, view in zip(theirs, views, strict=True):
        if found.interleaved and name in ("attn_q", "attn_k"):
            view = _interleaved(view, config.resolved_head_dim)
        full = f"blk.{layer}.{name}.{kind}"
        yield Tensor(full, view, bool(_FULL.search(full)))


def _interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of every head, ``[heads * head_dim, ...]``, reordered so that the two elements of a rotary pair are
    neighbors; in our layout they are half a head apart."""
    pairs = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
