"""Llama: RMS norms, rotary positions, grouped keys and values, and a gated feed-forward."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options
from tinytron.interop.families.shared import DENSE, decoder_names, read_decoder, read_one_window, write_decoder
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig


def _read(settings: Settings) -> Options:
    if not settings.switch("use_sliding_window", True):  # left over from Qwen, which has windows, in converted models
        settings.take("sliding_window", None)
        settings.take("max_window_layers", None)
    read_one_window(settings, 0)
    return {
        **read_decoder(settings),
        "intermediate_size": settings.integer("intermediate_size"),
        "attention_bias": settings.switch("attention_bias", False),
        "mlp_bias": settings.switch("mlp_bias", False),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), "attention_bias": config.has_out_bias, "mlp_bias": config.has_mlp_bias}


FAMILY = Family("llama", "LlamaForCausalLM", decoder_names(DENSE), _read, _write)
