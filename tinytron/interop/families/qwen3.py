"""Qwen3: Llama with normed queries and keys, and a sliding window in some layers."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options
from tinytron.interop.families.shared import (
    DENSE,
    decoder_names,
    read_decoder,
    read_qwen_windows,
    write_decoder,
    write_qwen_windows,
)
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig


def _read(settings: Settings) -> Options:
    options = {
        **read_decoder(settings),
        "intermediate_size": settings.integer("intermediate_size"),
        "qk_norm": True,
        "attention_bias": settings.switch("attention_bias", False),
    }
    options |= read_qwen_windows(settings, options["num_layer"])
    return options | {"head_dim": options["head_dim"] or 128}  # 128 is transformers' default


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_qwen_windows(config), "attention_bias": config.has_out_bias}


FAMILY = Family("qwen3", "Qwen3ForCausalLM", decoder_names(DENSE), _read, _write)
