"""Frequencies of rotary positions against those of transformers, at the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.interop.families import rope
from tinytron.interop.architectures import read_architecture
from tinytron.model.modules.rope import rotary_frequencies

KINDS: dict[str, dict[str, Any]] = {
    "default": rope("default"),
    "linear": rope("linear", factor=3.0),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=4096),
    "yarn slow": rope("yarn", factor=40.0, original_max_position_embeddings=512, beta_fast=20, beta_slow=2),
    "yarn factor": rope("yarn", factor=4.0, original_max_position_embeddings=4096, attention_factor=1.25),
    "yarn mscale": rope("yarn", factor=4.0, original_max_position_embeddings=4096, mscale=0.7, mscale_all_dim=1.3),
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_theirs(kind: str, head_dim: int, theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = KINDS[kind]["rope_parameters"] | {"rope_theta": theta}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=16384, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config)
    mine, scale = rotary_frequencies(read_architecture(config.to_dict(), "config.json")[1])
    torch.testing.assert_close(mine.float(), theirs.inv_freq.float(), rtol=2e-6, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
