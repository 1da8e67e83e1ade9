"""Models with every option that changes what a token sees, and the path without a cache."""

from __future__ import annotations

from typing import Any

import torch

from tests.model.test_gpt import SIZES
from tests.model.test_options import VARIANTS as OPTIONS
from tinytron.model import GPT, ModelConfig

BLOCK = 24
YARN = {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_block_size": 6}
LLAMA3 = {"rope_scaling": "llama3", "rope_scaling_factor": 4.0, "rope_original_block_size": 6}
MOE = {"use_moe": True, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "plain": {},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "qk norm": {"qk_norm": True, "head_dim": 6, "tied_lm_head": False},
    "yarn": YARN,
    "llama3": LLAMA3,
    "moe": MOE,
    "moe shared": MOE | {"num_shared_experts": 1, "first_k_dense": 1, "moe_router_score": "sigmoid"},
    "all at once": MOE | YARN | {
        "qk_norm": True, "rotary_fraction": 0.5, "sliding_window": 5, "sliding_window_layers": (0, 2), "num_layer": 3,
        "parallel_residual": True, "bias": True, "norm_type": "layer",
    },
}  # fmt: skip


def make_model(name: str = "plain", dtype: torch.dtype = torch.float64, seed: int = 2, **options: Any) -> GPT:
    """Weights are large, and norms and biases off their neutral values, so that nothing hides."""
    model = GPT(ModelConfig(**SIZES | {"block_size": BLOCK} | MODELS[name] | options), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.3 * noise)
    return model.eval()


@torch.no_grad()
def logits_of(model: GPT, ids: list[int]) -> torch.Tensor:
    """``[S, V]``: all of the text in one pass, nothing kept."""
    logits = model(torch.tensor([ids]))
    assert isinstance(logits, torch.Tensor)
    return logits[0]


def greedy(model: GPT, prompt: list[int], count: int, vocab_size: int | None = None) -> list[int]:
    """The ``count`` likeliest tokens of the first ``vocab_size`` after ``prompt``, all computed again for each; of a
    text that is too long the newest half is kept."""
    ids, made = list(prompt), list[int]()
    for _ in range(count):
        if len(ids) > model.config.block_size:
            ids = ids[-model.config.block_size // 2 :]
        made.append(int(logits_of(model, ids)[-1, :vocab_size].argmax()))
        ids.append(made[-1])
    return made


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Token ids of the models' vocabulary."""
    return torch.randint(SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()
