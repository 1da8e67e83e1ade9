"""Small random models of Hugging Face's own, one folder each: the other side of every comparison."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

VOCAB, S, B = 41, 16, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
NEOX: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=24)
# Name: class prefix, and options beside the sizes. At least two of every family.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama mha head_dim": ("Llama", {"num_key_value_heads": 4, "head_dim": 6, "rms_norm_eps": 0.01}),
    "llama linear": ("Llama", rope("linear", factor=2.0)),
    "llama llama3": ("Llama", LLAMA3 | {"num_key_value_heads": 1}),
    "llama yarn": ("Llama", YARN),
    "llama yarn mscale": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=0.7, mscale_all_dim=1.3, beta_fast=8),
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral no window": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "qwen3 windows": (
        "Qwen3",
        {
            "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral window": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, "head_dim": 6},
    ),
    "qwen3_moe some layers": (
        "Qwen3Moe",
        {
            "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 2,
            "mlp_only_layers": [3], "num_hidden_layers": 4, "attention_bias": True, "tie_word_embeddings": True,
        },
    ),
    "neox": ("GPTNeoX", {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.5}}),
    "neox in turn": (
        "GPTNeoX",
        {
            "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "gelu_new",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 90.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt2": ("GPT2", {}),
    "gpt2 untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 24, "activation_function": "gelu"}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The model of transformers: weights large, and norms and biases off their neutral values, so that nothing hides."""
    transformers = pytest.importorskip("transformers")
    prefix, options = MODELS[name]
    sizes = {"GPT2": GPT2, "GPTNeoX": NEOX}.get(prefix, SIZES)
    config = getattr(transformers, f"{prefix}Config")(
        **sizes | options, attn_implementation="sdpa"
    )  # in fp64 throughout, unlike eager
    config._experts_implementation = "eager"  # the others know no fp64
    cls = getattr(transformers, "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")
    model = cls(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise)
    return model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """``make`` and ``save_pretrained`` into ``folder``, without transformers' progress bar, which tests of our own output
    would see."""
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    model = make(name, dtype)
    model.save_pretrained(folder, **options)
    return model


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of a folder's config.json, and ids of tokens in its generation_config.json, too; ``None`` removes one."""
    _change(folder / "config.json", values)
    if (generation := folder / "generation_config.json").is_file():
        _change(generation, {key: value for key, value in values.items() if key.endswith("_token_id")})


def _change(path: Path, values: dict[str, Any]) -> None:
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None or key not in values}))


def batch(seed: int = 2, rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and shifted labels, of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, S + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3] = -100
    return tokens[:, :-1], labels


def their_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over targets, by transformers' logits and torch's cross entropy."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
