"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn as nn

from tinytron.distributed.param_spec import specs_of
from tinytron.errors import ConfigError
from tinytron.model import GPT, ModelConfig
from tinytron.optim import parameter_groups

CONFIG: dict[str, Any] = {
    "block_size": 8,
    "vocab_size": 11,
    "num_layer": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "bias": True,
    "qk_norm": True,
}
MATRICES = {"qkv_proj.weight", "out_proj.weight", "gate_up_proj.weight", "down_proj.weight"}


def decayed(model: nn.Module, decay_all: bool = False, decay_embeddings: bool = True) -> dict[str, float]:
    """Weight decay of every parameter, by name, after checking that each stands in one group."""
    groups = parameter_groups(model, specs_of(model), 0.1, decay_all=decay_all, decay_embeddings=decay_embeddings)
    assert all(group["params"] for group in groups)
    grouped = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(grouped) == len(dict(grouped))
    return {names[key]: decay for key, decay in grouped}


def short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_embedding_and_head_are_decayed(tied: bool) -> None:
    model = GPT(ModelConfig(**CONFIG, tied_lm_head=tied))
    expected = MATRICES | {"wte.weight"} | (set() if tied else {"lm_head.weight"})
    found = decayed(model)
    assert {short(name) for name, decay in found.items() if decay == 0.1} == expected
    assert set(found.values()) == {0.1, 0.0}
    assert len(found) == len(list(model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_can_be_left_out_but_not_the_head(tied: bool) -> None:
    found = decayed(GPT(ModelConfig(**CONFIG, tied_lm_head=tied)), decay_embeddings=False)
    expected = MATRICES | (set() if tied else {"lm_head.weight"})
    assert {short(name) for name, decay in found.items() if decay == 0.1} == expected


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_everything_can_be_decayed_in_one_group(decay_embeddings: bool) -> None:
    model = GPT(ModelConfig(**CONFIG))
    assert set(decayed(model, decay_all=True, decay_embeddings=decay_embeddings).values()) == {0.1}
    groups = parameter_groups(model, specs_of(model), 0.1, decay_all=True, decay_embeddings=decay_embeddings)
    assert len(groups) == 1


def test_frozen_parameters_are_left_out() -> None:
    model = GPT(ModelConfig(**CONFIG))
    model.wte.weight.requires_grad_(False)
    found = decayed(model)
    assert "wte.weight" not in found
    assert len(found) == len(list(model.parameters())) - 1


def test_a_foreign_model_is_sorted_by_dimensions_and_its_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    decays = {"0.weight": 0.1, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}
    assert decayed(model) == decays
    assert decayed(model, decay_embeddings=False) == decays | {"0.weight": 0.0}


# Learning-rate multipliers, and who is updated by Muon.

MULTIPLIERS = {"matrix": 2.0, "embedding": 3.0, "head": 5.0, "scalar": 7.0}
MOE = CONFIG | {
    "num_layer": 2,
    "first_k_dense": 1,
    "use_moe": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "num_shared_experts": 1,
}


def options_of(model: nn.Module, **options: Any) -> dict[str, dict[str, Any]]:
    """Each parameter's group without its parameters, by name, after checking that each stands in one group."""
    groups = parameter_groups(model, specs_of(model), 0.1, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(names.values())
    own = {i: {k: v for k, v in group.items() if k != "params"} for i, group in enumerate(groups)}
    assert len({str(options) for options in own.values()}) == len(groups)  # no two groups alike
    return {names[id(p)]: own[i] for i, group in enumerate(groups) for p in group["params"]}


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_multipliers_by_class_and_a_tied_head_is_the_embedding(tied: bool, muon: bool) -> None:
    found = options_of(GPT(ModelConfig(**MOE, tied_lm_head=tied)), muon=muon, lr_mults=MULTIPLIERS)
    assert found["wte.weight"]["lr_mult"] == 3.0
    assert ("lm_head.weight" in found) == (not tied)
    for name, options in found.items():
        if name == "lm_head.weight":
            assert options["lr_mult"] == 5.0
        elif name != "wte.weight":
            scalar = "norm" in name or name.endswith(".bias")
            assert options["lr_mult"] == (7.0 if scalar else 2.0), name
    assert {o["lr_mult"] for o in options_of(GPT(ModelConfig(**MOE)), muon=muon).values()} == {1.0}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_matrices_but_not_router_embedding_and_head(tied: bool) -> None:
    found = options_of(GPT(ModelConfig(**MOE, tied_lm_head=tied)), muon=True)
    of_muon = {name: options["row_blocks"] for name, options in found.items() if options["kind"] == "muon"}
    attention = {"qkv_proj.weight": (8, 4, 4), "out_proj.weight": ()}  # two query heads and one each of width 4
    expected: dict[str, tuple[int, ...]] = {f"blocks.{i}.attn.{n}": b for i in range(2) for n, b in attention.items()}
    expected |= {"blocks.0.mlp.gate_up_proj.weight": (12, 12), "blocks.0.mlp.down_proj.weight": ()}
    expected |= {"blocks.1.mlp.experts.gate_up_proj": (6, 6), "blocks.1.mlp.experts.down_proj": ()}
    expected |= {"blocks.1.mlp.shared.gate_up_proj.weight": (6, 6), "blocks.1.mlp.shared.down_proj.weight": ()}
    assert of_muon == expected
    rest = {name for name, options in found.items() if options["kind"] == "adamw"}
    assert {"wte.weight", "blocks.1.mlp.router.weight", "final_norm.weight"} <= rest
    assert rest | set(of_muon) == set(found)


@pytest.mark.parametrize("muon", [True, False])
def test_experts_and_router_are_decayed(muon: bool) -> None:
    found = options_of(GPT(ModelConfig(**MOE)), muon=muon, decay_embeddings=False)
    for name, options in found.items():
        plain = "norm" in name or name.endswith(".bias") or name == "wte.weight"
        assert options["weight_decay"] == (0.0 if plain else 0.1), name


def test_without_muon_groups_say_nothing_of_it() -> None:
    assert {key for o in options_of(GPT(ModelConfig(**MOE))).values() for key in o} == {"weight_decay", "lr_mult"}


# Layer-wise rates.


def test_rates_fall_from_the_head_to_the_embedding() -> None:
    config = ModelConfig(**MOE | {"num_layer": 3, "position_type": "learned"}, tied_lm_head=False)
    found = options_of(GPT(config), layer_decay=0.5, lr_mults=MULTIPLIERS)
    expected = {"lm_head": 1.0, "final_norm": 1.0, "blocks.2": 0.5, "blocks.1": 0.25, "blocks.0": 0.125}
    expected |= {"wte": 0.0625, "wpe": 0.0625}
    plain = options_of(GPT(config), lr_mults=MULTIPLIERS)
    for name, options in found.items():
        (rate,) = (rate for part, rate in expected.items() if name.startswith(part))
        assert options["lr_mult"] == rate * plain[name]["lr_mult"], name


def test_rates_of_a_foreign_model_go_by_the_numbers_in_its_names() -> None:
    layers = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])})
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "model": layers, "head": nn.Linear(4, 5, bias=False)})
    found = {name: options["lr_mult"] for name, options in options_of(model, layer_decay=0.5).items()}
    assert found == {"embed.weight": 0.125, "model.h.0.weight": 0.25, "model.h.1.weight": 0.5, "head.weight": 1.0}
    with pytest.raises(ConfigError, match=r"--layer_lr_decay 0.5 needs blocks with numbers .* has weight; use 1"):
        options_of(nn.Linear(3, 3), layer_decay=0.5)
