"""Every rule of the architecture, and that the value each message proposes works."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from tinytron.errors import ConfigError
from tinytron.model import ModelConfig

VALID: dict[str, Any] = {
    "block_size": 64,
    "vocab_size": 100,
    "num_layer": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 48,
    "intermediate_size": 64,
}


def refusal(**changes: Any) -> str:
    """The text of the error that ``VALID`` with ``changes`` gives."""
    with pytest.raises(ConfigError, match=r"^.+$") as caught:  # one line
        ModelConfig(**VALID | changes)
    return str(caught.value)


MAY_BE_ZERO = ["num_shared_experts", "first_k_dense", "sliding_window", "mup_base_width"]
COUNTS = [f.name for f in dataclasses.fields(ModelConfig) if f.type.startswith("Annotated[int, ")]
SIZES = [name for name in COUNTS if name not in MAY_BE_ZERO]


def test_the_sizes_are_these() -> None:
    experts = ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
    assert sorted(COUNTS) == sorted([*VALID, *experts, *MAY_BE_ZERO])


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    assert refusal(**{name: value}) == f"--{name} {value} must be at least 1"


def test_key_value_heads_divide_the_query_heads() -> None:
    text = refusal(num_attention_heads=12, num_key_value_heads=5)
    assert text == "--num_key_value_heads 5 must divide --num_attention_heads 12; use one of [1, 2, 3, 4, 6, 12]"
    for works in (1, 2, 3, 4, 6, 12):
        ModelConfig(**VALID | {"num_attention_heads": 12, "num_key_value_heads": works})


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads"), [(48, 5, 1), (48, 10, 2), (64, 6, 3), (48, 36, 12), (30, 4, 1)]
)
def test_heads_divide_the_hidden_size(hidden: int, heads: int, kv_heads: int) -> None:
    sizes = {"hidden_size": hidden, "num_key_value_heads": kv_heads}
    text = refusal(**sizes, num_attention_heads=heads)
    start = f"--num_attention_heads {heads} must divide --hidden_size {hidden}; use "
    assert text.startswith(start)
    if proposed := re.search(r"use one of \[([\d, ]+)\], or give --head_dim", text):
        for works in proposed.group(1).split(", "):
            ModelConfig(**VALID | sizes | {"num_attention_heads": int(works)})
    else:  # 64 has no divisor that 3 key/value heads divide
        assert (hidden, kv_heads, text) == (64, 3, start + "--head_dim 64")
        ModelConfig(**VALID | sizes | {"num_attention_heads": heads, "head_dim": 64})


@pytest.mark.parametrize(
    ("changes", "head_dim", "works"),
    [
        ({"hidden_size": 12}, 3, 4),
        ({"hidden_size": 4}, 1, 2),
        ({"head_dim": 7}, 7, 8),
        ({"head_dim": 0}, 0, 2),
        ({"head_dim": -4}, -4, 2),
        ({"head_dim": -3}, -3, 2),
    ],
)
def test_the_head_dimension_is_even(changes: dict[str, int], head_dim: int, works: int) -> None:
    text = f"the head dimension {head_dim} must be even for rotary positions; use --head_dim {works}"
    assert refusal(**changes) == text
    assert ModelConfig(**VALID | changes | {"head_dim": works}).resolved_head_dim == works


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, math.nan])
def test_dropout_is_a_probability_below_one(value: float) -> None:
    assert refusal(dropout=value) == f"--dropout {value} must be in [0, 1); use 0.1"
    ModelConfig(**VALID, dropout=0.1)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "rule", "works"),
    [("init_std", "in (0, 10]", 0.013), ("norm_eps", "in (0, 1]", 1e-6), ("rope_theta", "in (1, 1e+30]", 10000.0)],
)
def test_scales_have_a_rule(name: str, rule: str, value: float, works: float) -> None:
    assert refusal(**{name: value}) == f"--{name} {value} must be {rule}; use {works}"
    ModelConfig(**VALID | {name: works})


@pytest.mark.parametrize(
    ("name", "value"), [("init_std", 1e300), ("norm_eps", 1e38), ("rope_theta", 1.0), ("rope_theta", 1e300)]
)
def test_scales_that_overflow_or_divide_by_zero_are_refused(name: str, value: float) -> None:
    assert refusal(**{name: value}).startswith(f"--{name} {value} must be ")


def test_no_more_experts_per_token_than_experts() -> None:
    text = "--num_experts_per_tok 9 must not exceed --num_experts 8; use at most 8"
    assert refusal(use_moe=True, num_experts=8, num_experts_per_tok=9) == text
    ModelConfig(**VALID, use_moe=True, num_experts=8, num_experts_per_tok=8)
    ModelConfig(**VALID, use_moe=False, num_experts=8, num_experts_per_tok=9)  # of no effect


AMOUNTS = ["moe_aux_loss_coef", "moe_z_loss_coef", "moe_bias_update_rate"]


@pytest.mark.parametrize("name", [*MAY_BE_ZERO, *AMOUNTS])
def test_amounts_of_the_experts_are_not_negative(name: str) -> None:
    for value in (-1, -0.5, math.nan, math.inf)[: None if name in AMOUNTS else 1]:
        rule = "in 0..1000000.0" if name in AMOUNTS else "at least 0"
        works = 256 if name == "mup_base_width" else 0
        assert refusal(**{name: value}) == f"--{name} {value} must be {rule}; use {works}"
    ModelConfig(**VALID, use_moe=True, **{name: 0})


@pytest.mark.parametrize("first_k_dense", [2, 3])
def test_some_layer_has_experts(first_k_dense: int) -> None:
    text = f"--first_k_dense {first_k_dense} leaves no expert layer of --num_layer 2; use at most 1, or drop --use_moe"
    assert refusal(use_moe=True, first_k_dense=first_k_dense) == text
    ModelConfig(**VALID, use_moe=True, first_k_dense=1)
    ModelConfig(**VALID, use_moe=False, first_k_dense=first_k_dense)  # of no effect


@pytest.mark.parametrize("use_moe", [True, False])
def test_layers_from_first_k_dense_on_have_experts(use_moe: bool) -> None:
    config = ModelConfig(**VALID | {"num_layer": 4}, use_moe=use_moe, first_k_dense=2)
    assert [config.is_moe_layer(layer) for layer in range(4)] == [False, False, use_moe, use_moe]


# Architectures of other families.


@pytest.mark.parametrize(
    ("changes", "text", "works"),
    [
        (
            {"rotary_fraction": 0.3},
            "--rotary_fraction 0.3 rotates 3 of 12 elements, but the number must be even; use 0.333333",
            {"rotary_fraction": 0.333334},
        ),
        (
            {"rotary_fraction": 0.01},
            "--rotary_fraction 0.01 rotates 0 of 12 elements, but the number must be even; use 0.166667",
            {"rotary_fraction": 0.166667},
        ),
        *(
            ({"rotary_fraction": value}, f"--rotary_fraction {value} must be above 0 and at most 1; use 1.0", {})
            for value in (0.0, 1.5, -1.0, math.nan)
        ),
        *(
            (
                {"rope_scaling": "linear", "rope_scaling_factor": value},
                f"--rope_scaling_factor {value} must be in 1..1e6; use 8.0",
                {"rope_scaling": "linear", "rope_scaling_factor": 8.0},
            )
            for value in (0.5, 1e300, math.nan, math.inf)
        ),
        *(
            (
                {"rope_scaling": kind, "rope_scaling_factor": 4.0},
                f"--rope_scaling {kind} needs the sequence length before the extension; use --rope_original_block_size 16",
                {"rope_scaling": kind, "rope_scaling_factor": 4.0, "rope_original_block_size": 16},
            )
            for kind in ("llama3", "yarn")
        ),
        (
            {"rope_scaling": "llama3", "rope_original_block_size": 16, "rope_low_freq_factor": 4.0},
            "--rope_low_freq_factor 4.0 must be below --rope_high_freq_factor 4.0, and both in 1e-6..1e6; "
            "use 1.0 and 4.0",
            {"rope_scaling": "llama3", "rope_original_block_size": 16},
        ),
        *(
            (
                {"rope_scaling": "yarn", "rope_original_block_size": 16, "rope_beta_slow": value},
                f"--rope_beta_slow {value} must be below --rope_beta_fast 32.0, and both in 1e-6..1e6; use 1.0 and 32.0",
                {"rope_scaling": "yarn", "rope_original_block_size": 16},
            )
            for value in (0.0, 1e-320)  # a quotient by the latter is infinite
        ),
        (
            {"rope_scaling": "yarn", "rope_original_block_size": 16, "rope_attention_factor": 0.0},
            "--rope_attention_factor 0.0 must be in 1e-6..1e6; use 1.0",
            {"rope_scaling": "yarn", "rope_original_block_size": 16, "rope_attention_factor": 1.0},
        ),
        (
            {"sliding_window": 4, "sliding_window_layers": (0, 2)},
            "--sliding_window_layers 2 is not a layer of --num_layer 2; use 0 to 1",
            {"sliding_window": 4, "sliding_window_layers": (0, 1)},
        ),
        (
            {"sliding_window_layers": (1,)},
            "--sliding_window_layers needs --sliding_window; use --sliding_window 4096",
            {"sliding_window_layers": (1,), "sliding_window": 4096},
        ),
        ({"sliding_window": -1}, "--sliding_window -1 must be at least 0; use 0", {"sliding_window": 0}),
        (
            {"use_moe": True, "dense_layers": (-1,)},
            "--dense_layers -1 is not a layer of --num_layer 2; use 0 to 1",
            {"use_moe": True, "dense_layers": (1,)},
        ),
        (
            {"use_moe": True, "dense_layers": (0, 1)},
            "--dense_layers 0 1 leaves no expert layer of --num_layer 2; leave one out, or drop --use_moe",
            {"use_moe": False, "dense_layers": (0, 1)},
        ),
        (
            {"use_moe": True, "mlp_type": "gelu"},
            "--mlp_type gelu does not work with --use_moe: experts are swiglu; use swiglu",
            {"use_moe": True, "mlp_type": "swiglu"},
        ),
        (
            {"position_type": "learned", "head_dim": 0},
            "--head_dim 0 must be at least 1",
            {"position_type": "learned", "head_dim": 7},
        ),
    ],
)
def test_options_of_other_families(changes: dict[str, Any], text: str, works: dict[str, Any]) -> None:
    assert refusal(**changes) == text
    ModelConfig(**VALID | works)


def test_windows_and_experts_are_for_the_layers_named() -> None:
    config = ModelConfig(**VALID | {"num_layer": 4}, use_moe=True, first_k_dense=1, dense_layers=(2,))
    assert config.moe_layers == (1, 3)
    assert [config.window(layer) for layer in range(4)] == [0, 0, 0, 0]
    config = ModelConfig(**VALID | {"num_layer": 4}, sliding_window=5, sliding_window_layers=(1, 2))
    assert [config.window(layer) for layer in range(4)] == [0, 5, 5, 0]
    assert ModelConfig(**VALID, sliding_window=5).window(1) == 5


def test_biases_are_switched_together_or_by_part() -> None:
    def parts(**switches: bool) -> tuple[bool, bool, bool]:
        config = ModelConfig(**VALID, **switches)
        return config.has_qkv_bias, config.has_out_bias, config.has_mlp_bias

    assert parts() == (False, False, False)
    assert parts(bias=True) == (True, True, True)
    assert parts(qkv_bias=True) == (True, False, False)
    assert parts(attention_bias=True) == (True, True, False)
    assert parts(mlp_bias=True) == (False, False, True)


def test_the_head_dimension_is_given_or_derived() -> None:
    assert ModelConfig(**VALID).resolved_head_dim == 12
    assert ModelConfig(**VALID, head_dim=10).resolved_head_dim == 10
    assert ModelConfig(**VALID | {"hidden_size": 50}, head_dim=10).resolved_head_dim == 10


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**VALID).num_layer = 3  # type: ignore[misc]
