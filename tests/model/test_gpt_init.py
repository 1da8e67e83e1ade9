"""Initial weights as a function of (seed, name), and what each parameter says about itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tinytron.model import GPT, ModelConfig
from tinytron.model.gpt import named_normal

SIZES: dict[str, Any] = {
    "block_size": 16,
    "vocab_size": 100,
    "num_layer": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "init_std": 0.02,
}


def initial(seed: int = 3, **changes: Any) -> dict[str, torch.Tensor]:
    sizes = SIZES | {"tied_lm_head": False} | changes
    return {n: p.detach() for n, p in GPT(ModelConfig(**sizes), seed=seed).named_parameters()}


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    two = initial()
    torch.manual_seed(1)
    torch.rand(7)
    three = initial(num_layer=3, dropout=0.1, qk_norm=True)
    for name, weight in two.items():
        if name.endswith(("out_proj.weight", "down_proj.weight")):  # 1 / sqrt(2 L): a factor, the same numbers
            torch.testing.assert_close(three[name] * (3 / 2) ** 0.5, weight)
        else:
            assert torch.equal(three[name], weight), name


def test_initial_weights_are_the_same_numbers_in_every_precision() -> None:
    exact = dict(GPT(ModelConfig(**SIZES), seed=3).named_parameters())
    for dtype in (torch.bfloat16, torch.float64):
        for name, weight in GPT(ModelConfig(**SIZES), seed=3, dtype=dtype).named_parameters():
            assert torch.equal(weight, exact[name].to(dtype)), name


def test_named_normal_heeds_no_default_of_torch() -> None:
    expected = named_normal("wte.weight", (5, 7), 0.02, seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = named_normal("wte.weight", (5, 7), 0.02, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, expected)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors, over the common length."""
    n = min(a.numel(), b.numel())
    return float(torch.corrcoef(torch.stack([a.flatten()[:n], b.flatten()[:n]]))[0, 1]) * n**0.5


def test_no_two_initial_tensors_are_alike() -> None:
    weights = initial(num_layer=3)
    parts: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith("qkv_proj.weight"):
            parts |= {f"{name}[{head}]": part for head, part in enumerate(weight.split(16))}
        elif name.endswith("gate_up_proj.weight"):
            parts[f"{name}[gate]"], parts[f"{name}[up]"] = weight.chunk(2)
        elif "norm" not in name:
            parts[name] = weight
    assert len(parts) == 2 + 3 * (8 + 2 + 2)
    for a, b in itertools.combinations(parts, 2):
        assert abs(correlation(parts[a], parts[b])) < 5, (a, b)


def test_another_seed_gives_other_weights() -> None:
    first, second = initial(seed=3), initial(seed=4)
    for name in first:
        if "norm" not in name:
            assert abs(correlation(first[name], second[name])) < 5, name


def test_initial_weights_have_the_right_scale() -> None:
    weights = initial(num_layer=3, bias=True, qk_norm=True)
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith(".bias"):
            assert torch.equal(weight, torch.zeros_like(weight)), name
        else:
            residual = name.endswith(("out_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
            assert float(weight.std()) == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5), name
            assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5, name
    assert sum("norm" in name for name in weights) == 3 * 4 + 1


def test_init_weights_draws_again() -> None:
    model = GPT(ModelConfig(**SIZES), seed=3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.init_weights(4)
    model.init_weights(3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_param_specs_state_every_parameter_once(tied: bool) -> None:
    model = GPT(ModelConfig(**SIZES | {"tied_lm_head": tied, "bias": True, "qk_norm": True, "num_layer": 1}))
    specs = model.param_specs()
    assert [(s.name, s.shape) for s in specs] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    block = {
        "attn_norm.weight": "norm",
        "attn.qkv_proj.weight": "matrix",
        "attn.qkv_proj.bias": "bias",
        "attn.out_proj.weight": "matrix",
        "attn.out_proj.bias": "bias",
        "attn.q_norm.weight": "norm",
        "attn.k_norm.weight": "norm",
        "mlp_norm.weight": "norm",
        "mlp.gate_up_proj.weight": "matrix",
        "mlp.gate_up_proj.bias": "bias",
        "mlp.down_proj.weight": "matrix",
        "mlp.down_proj.bias": "bias",
    }
    expected = {"wte.weight": "embedding"} | {f"blocks.0.{n}": kind for n, kind in block.items()}
    expected |= {"final_norm.weight": "norm"} | ({} if tied else {"lm_head.weight": "head"})
    assert {s.name: s.kind for s in specs} == expected
    residual = {s.name for s in specs if s.writes_residual and s.kind == "matrix"}
    assert residual == {"blocks.0.attn.out_proj.weight", "blocks.0.mlp.down_proj.weight"}
    assert {s.shards for s in specs} == {()}
    assert all(s.numel == p.numel() for s, p in zip(specs, model.parameters(), strict=True))
