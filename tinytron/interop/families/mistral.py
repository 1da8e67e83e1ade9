"""Mistral: Llama without biases, with one sliding window in all layers."""

from __future__ import annotations

from typing import Any

from tinytron.interop.families.family import Family, Options
from tinytron.interop.families.shared import (
    DENSE,
    decoder_names,
    read_decoder,
    read_one_window,
    read_window,
    write_decoder,
)
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig


def _read(settings: Settings) -> Options:
    return {
        **read_decoder(settings),
        "intermediate_size": settings.integer("intermediate_size"),
        "sliding_window": read_one_window(settings, read_window(settings)),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), "sliding_window": config.window(0) or None}


FAMILY = Family("mistral", "MistralForCausalLM", decoder_names(DENSE), _read, _write)
