"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and a sliding window in some layers."""

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
        "qkv_bias": True,
    }
    return options | read_qwen_windows(settings, options["num_layer"])


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_qwen_windows(config)}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", decoder_names(DENSE), _read, _write)
