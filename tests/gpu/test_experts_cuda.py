"""Experts on a GPU: grouped products, and a whole expert layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, REHEARSING, matmul_precision, relative_error, sized
from tests.naive.moe import Rules, moe
from tinytron.kernels.grouped_gemm import grouped_linear, has_grouped_product, looped_linear
from tinytron.model import ModelConfig
from tinytron.model.modules.moe import MoE

pytestmark = GPU_TEST

DTYPES = [(torch.bfloat16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)]
COUNTS = {
    "an empty one": [100, 0, 31, 125],
    "empty first and last": [0, 0, 250, 6, 0],
    "all in one": [0, 0, 256, 0],
    "one row": [1],
    "many": [7 * (i % 3) for i in range(64)],
}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_grouped_product_equals_one_product_per_expert(name: str, dtype: torch.dtype, tolerance: float) -> None:
    counts = COUNTS[name]
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), 64, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), 128, 64, device=DEVICE).to(dtype).requires_grad_()
    exact_inputs = [t.detach().double().requires_grad_() for t in (rows, weight)]
    with matmul_precision("highest"):
        out = grouped_linear(rows, weight, torch.tensor(counts, device=DEVICE), counts)
        exact = looped_linear(*exact_inputs, counts)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, (rows, weight), grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    assert out.dtype == dtype
    assert relative_error(out, exact) < tolerance
    for mine, theirs in zip(grads, expected, strict=True):
        assert relative_error(mine, theirs) < tolerance
    for i, count in enumerate(counts):
        assert count or not grads[1][i].any()  # zero, not what was in memory


def test_grouped_products_of_the_gpu_are_in_bf16() -> None:
    """What is true of fp32 on CPUs only would otherwise be asked of the GPU."""
    weight = torch.empty(2, 16, 16, device=DEVICE)
    assert has_grouped_product(weight.bfloat16())
    assert has_grouped_product(weight) == REHEARSING
    assert not has_grouped_product(weight.bfloat16()[:, :, :3])


LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid, shared": {"moe_router_score": "sigmoid", "num_shared_experts": 1},
    "one choice": {"num_experts_per_tok": 1, "norm_topk_prob": False},
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_one_token_at_a_time(name: str, dtype: torch.dtype, tolerance: float, recompute: Any) -> None:
    """Against the naive twin on the CPU in fp64. The router is wide and its inputs are bf16, so no choice is close."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_layer": 1} | {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    layer = MoE(ModelConfig(**{"use_moe": True, **sizes, **LAYERS[name]}), None, recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * (1.0 if "router" in key else 0.2)
            parameter.copy_(drawn.bfloat16())
    tokens = torch.randn(2, sized(40, 8), 32, generator=generator).bfloat16()
    exact_weights = {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}
    exact_tokens = tokens.double().requires_grad_()
    config = layer.config
    rules = Rules(config.num_experts_per_tok, config.moe_router_score, config.norm_topk_prob)
    exact, decisions = moe(exact_tokens.flatten(0, 1), exact_weights, rules)

    layer = layer.to(DEVICE, dtype)
    mine = tokens.to(DEVICE, dtype).requires_grad_()
    with matmul_precision("highest"):
        out, stats = layer(mine, layer.router(mine.flatten(0, 1)))
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        out.backward(grad.to(DEVICE, dtype))
    exact.backward(grad.flatten(0, 1))
    assert stats.load_E.tolist() == [sum(d.experts.count(e) for d in decisions) for e in range(6)]
    loose = 4 * tolerance  # several products and roundings
    assert relative_error(out.flatten(0, 1), exact) < loose
    assert relative_error(mine.grad, exact_tokens.grad) < loose
    for key, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, exact_weights[key].grad) < loose, key
