"""Counters against counting: parameters of real models, FLOPs of torch's own counter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinytron.kernels.choice import Kernels
from tinytron.model import GPT, ModelConfig
from tinytron.utils.model import count_parameters, train_flops_per_token

S = 12
SIZES: dict[str, Any] = {
    "block_size": S,
    "vocab_size": 37,
    "num_attention_heads": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [None, 10])
def test_parameter_count_is_exact(kv_heads: int, head_dim: int | None) -> None:
    for tied, bias, qk_norm, num_layer in itertools.product((True, False), (True, False), (True, False), (1, 3)):
        config = ModelConfig(
            **SIZES, num_key_value_heads=kv_heads, head_dim=head_dim, tied_lm_head=tied, bias=bias, qk_norm=qk_norm,
            num_layer=num_layer,
        )  # fmt: skip
        model = GPT(config)
        count = count_parameters(config)
        assert count.total == sum(p.numel() for p in model.parameters()), config
        assert count.active == count.total
        assert count.embedding == model.wte.weight.numel()


def test_parameter_count_with_experts_adds_up_their_tensors() -> None:
    dense = ModelConfig(**SIZES, num_key_value_heads=2, num_layer=3)
    experts = ModelConfig(
        **SIZES, num_key_value_heads=2, num_layer=3, use_moe=True, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    router, expert, replaced = 8 * 24, 3 * 24 * 16, 3 * 24 * 40
    count, plain = count_parameters(experts), count_parameters(dense)
    assert count.total == plain.total + 3 * (router + 8 * expert - replaced)
    assert count.active == plain.total + 3 * (router + 2 * expert - replaced)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, None), (2, None), (1, None), (2, 10)])
@pytest.mark.parametrize("num_layer", [1, 3])
def test_flops_equal_those_of_torchs_counter(num_layer: int, kv_heads: int, head_dim: int | None, tied: bool) -> None:
    """Exactly, on forward and backward. The counter sees matrix products by their shapes, so

    - attention must be the ``math`` backend: on a CPU the counter has no formula for SDPA's kernel and counts nothing;
    - it counts all S x S scores, hence ``causal=False``;
    - the fused loss does its three products (logits, and the gradients of hidden states and weight) in the forward pass
      and none in the backward pass: their sum is the 3 x forward that the formula has.
    """
    config = ModelConfig(
        **SIZES, num_key_value_heads=kv_heads, head_dim=head_dim, tied_lm_head=tied, num_layer=num_layer
    )
    model = GPT(config, kernels=Kernels(attention="math"))
    ids = torch.randint(37, (2, S))
    with FlopCounterMode(display=False) as counter:
        losses = model(ids, ids)
        losses.objective.backward()
    assert counter.get_total_flops() == train_flops_per_token(config, S, causal=False) * ids.numel()


def test_sdpa_flops_lack_only_the_attention_products() -> None:
    config = ModelConfig(**SIZES, num_key_value_heads=2, num_layer=3)
    model = GPT(config, kernels=Kernels(attention="sdpa"))
    ids = torch.randint(37, (2, S))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).objective.backward()
    scores_and_values = 3 * 3 * 2 * 2 * 24 * S  # layers, forward and backward, two products of two FLOPs, q width, keys
    assert counter.get_total_flops() == (train_flops_per_token(config, S, causal=False) - scores_and_values) * 2 * S


def test_causal_flops_count_the_positions_a_token_sees() -> None:
    config = ModelConfig(**SIZES, num_key_value_heads=2, num_layer=3)
    seen = sum(len(range(t + 1)) for t in range(S)) / S
    per_position = 3 * 3 * 2 * 2 * 24
    difference = train_flops_per_token(config, S, causal=False) - train_flops_per_token(config, S)
    assert difference == per_position * (S - seen)


def test_flops_with_experts_replace_the_dense_layer() -> None:
    dense = ModelConfig(**SIZES, num_key_value_heads=2, num_layer=3)
    experts = ModelConfig(
        **SIZES, num_key_value_heads=2, num_layer=3, use_moe=True, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    router, two_experts, replaced = 8 * 24, 2 * 3 * 24 * 16, 3 * 24 * 40
    added = 3 * 3 * 2 * (router + two_experts - replaced)
    assert train_flops_per_token(experts, S) == train_flops_per_token(dense, S) + added


EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "num_layer": 3,
    "use_moe": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MIXES = list(itertools.product((0, 1, 3), (0, 1, 2), (True, False)))


@pytest.mark.parametrize(("shared", "first_k_dense", "bias"), MIXES)
def test_parameter_count_with_experts_is_exact(shared: int, first_k_dense: int, bias: bool) -> None:
    config = ModelConfig(**SIZES, **EXPERTS, num_shared_experts=shared, first_k_dense=first_k_dense, bias=bias)
    sizes = {name: p.numel() for name, p in GPT(config).named_parameters()}
    count = count_parameters(config)
    assert count.total == sum(sizes.values())
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert of_experts == (3 - first_k_dense) * 8 * 3 * 24 * 16
    assert count.active == count.total - of_experts * 6 // 8  # of eight experts a token uses two


@pytest.mark.parametrize(("shared", "first_k_dense"), list(itertools.product((0, 2), (0, 1))))
def test_flops_with_experts_equal_those_of_torchs_counter(shared: int, first_k_dense: int) -> None:
    """In fp64, where experts are one matrix product each, which the counter knows."""
    config = ModelConfig(**SIZES, **EXPERTS, num_shared_experts=shared, first_k_dense=first_k_dense)
    model = GPT(config, kernels=Kernels(attention="math"), dtype=torch.float64)
    ids = torch.randint(37, (2, S))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).objective.backward()
    assert counter.get_total_flops() == train_flops_per_token(config, S, causal=False) * ids.numel()


def test_options_of_experts_count_for_nothing_in_a_dense_model() -> None:
    dense = ModelConfig(**SIZES, **EXPERTS | {"use_moe": False}, num_shared_experts=2, first_k_dense=1)
    plain = ModelConfig(**SIZES, num_key_value_heads=2, num_layer=3)
    assert count_parameters(dense) == count_parameters(plain)
    assert train_flops_per_token(dense, S) == train_flops_per_token(plain, S)


# Architectures of other families.

PARTS: list[dict[str, Any]] = [
    {"norm_type": "layer"},
    {"norm_type": "layer", "qk_norm": True},
    {"mlp_type": "gelu"},
    {"mlp_type": "gelu_tanh", "mlp_bias": True},
    {"position_type": "learned"},
    {"qkv_bias": True},
    {"attention_bias": True},
    {"parallel_residual": True, "rotary_fraction": 0.34},
    {"sliding_window": 5, "sliding_window_layers": (1,)},
    {"norm_type": "layer", "mlp_type": "gelu", "position_type": "learned", "bias": True, "tied_lm_head": False},
]


@pytest.mark.parametrize("options", PARTS)
def test_counts_of_other_architectures_are_exact(options: dict[str, Any]) -> None:
    config = ModelConfig(**SIZES, num_key_value_heads=2, num_layer=2, **options)
    model = GPT(config, kernels=Kernels(attention="math"))
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    ids = torch.randint(37, (2, S))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).objective.backward()
    assert counter.get_total_flops() == train_flops_per_token(config, S, causal=False) * ids.numel()


def test_counts_with_experts_in_some_layers_are_exact() -> None:
    config = ModelConfig(**SIZES, **EXPERTS, dense_layers=(1,), norm_type="layer", attention_bias=True)
    assert count_parameters(config).total == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("window", [1, 5, S, 3 * S])
def test_windows_count_the_positions_a_token_sees(window: int) -> None:
    sizes: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "num_layer": 3}
    some = ModelConfig(**sizes, sliding_window=window, sliding_window_layers=(0, 2))
    seen = sum(min(t + 1, window) for t in range(S)) / S
    all_seen = (S + 1) / 2
    per_position = 2 * 3 * 2 * 2 * 24  # layers with a window, forward and backward, two products of two FLOPs, q width
    difference = train_flops_per_token(ModelConfig(**sizes), S) - train_flops_per_token(some, S)
    assert difference == pytest.approx(per_position * (all_seen - seen))
