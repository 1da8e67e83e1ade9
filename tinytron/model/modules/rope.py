"""The angles of rotary positions, plain or stretched to longer sequences."""

from __future__ import annotations

import math

import torch

from tinytron.model.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of elements, ``[rotary_dim / 2]`` in float64, and what cosines and sines are
    multiplied by. The formulas are those of Hugging Face's ``ROPE_INIT_FUNCTIONS``."""
    dim = config.rotary_dim
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(1, dim))
    if config.rope_scaling == "none" or dim == 0:
        return plain, 1.0
    slow = plain / config.rope_scaling_factor
    if config.rope_scaling == "linear":
        return slow, 1.0
    assert config.rope_original_block_size is not None, "checked by ModelConfig"
    if config.rope_scaling == "llama3":
        return _llama3(config, plain, slow, config.rope_original_block_size), 1.0
    factor = config.rope_attention_factor
    attention = 0.1 * math.log(config.rope_scaling_factor) + 1.0 if factor is None else factor
    return _yarn(config, plain, slow, config.rope_original_block_size), attention


def _llama3(config: ModelConfig, plain: torch.Tensor, slow: torch.Tensor, length: int) -> torch.Tensor:
    """Pairs that turn often in the original ``length`` stay, those that turn rarely are slowed down, between them a mean
    that is linear in the number of turns."""
    turns = length * plain / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return slow * (1 - kept) + plain * kept


def _yarn(config: ModelConfig, plain: torch.Tensor, slow: torch.Tensor, length: int) -> torch.Tensor:
    """As for llama3, but linear in the pair's index, between the indices (rounded outwards) at which a pair turns
    ``rope_beta_fast`` and ``rope_beta_slow`` times (arXiv:2309.00071, section 3.2)."""
    dim = config.rotary_dim

    def index(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(index(config.rope_beta_fast)), 0)
    last = float(min(math.ceil(index(config.rope_beta_slow)), dim - 1))
    last = last + 0.001 if last == first else last
    slowed = ((torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return slow * slowed + plain * (1 - slowed)
