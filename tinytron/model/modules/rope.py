"""The frequencies of rotary positions, plain or scaled for longer sequences."""

from __future__ import annotations

import math

import torch

from tinytron.model.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """The frequency of each pair of elements, in radians per position, ``[rotary_dim / 2]`` in float64; and the factor for
    cosines and sines. The formulas are those of Hugging Face's ``ROPE_INIT_FUNCTIONS``."""
    dim = config.rotary_dim
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(1, dim))
    if config.rope_scaling == "none" or dim == 0:
        return plain, 1.0
    slow = plain / config.rope_scaling_factor
    if config.rope_scaling == "linear":
        return slow, 1.0
    assert config.rope_original_block_size is not None, "ModelConfig checks this"
    if config.rope_scaling == "llama3":
        return _llama3(config, plain, slow, config.rope_original_block_size), 1.0
    factor = config.rope_attention_factor
    attention = 0.1 * math.log(config.rope_scaling_factor) + 1.0 if factor is None else factor
    return _yarn(config, plain, slow, config.rope_original_block_size), attention


def _llama3(config: ModelConfig, plain: torch.Tensor, slow: torch.Tensor, length: int) -> torch.Tensor:
    """Llama scaling: pairs with many rotations over the original ``length`` are unchanged, pairs with few are slowed
    down. In between, the frequency is a mean of the two, weighted linearly in the number of rotations."""
    turns = length * plain / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return slow * (1 - kept) + plain * kept


def _yarn(config: ModelConfig, plain: torch.Tensor, slow: torch.Tensor, length: int) -> torch.Tensor:
    """YaRN scaling (arXiv:2309.00071, section 3.2). It is like llama3's, but the weight is linear in the pair's index,
    between the indices (rounded outwards) at which a pair makes ``rope_beta_fast`` and ``rope_beta_slow`` rotations."""
    dim = config.rotary_dim

    def index(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(index(config.rope_beta_fast)), 0)
    last = float(min(math.ceil(index(config.rope_beta_slow)), dim - 1))
    last = last + 0.001 if last == first else last
    slowed = ((torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return slow * slowed + plain * (1 - slowed)
