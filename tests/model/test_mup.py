"""``--mup_base_width``: weights, rates and multipliers by width, on every layout, and exports without multipliers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import redrawn
from tests.helpers.ranks import Ranks
from tests.helpers.runs import config_of, losses, train
from tests.interop.test_export import opened, write_run
from tinytron.errors import ConfigError
from tinytron.interop.export import export
from tinytron.interop.mup import folded_config, folded_weights
from tinytron.model import GPT, ModelConfig
from tinytron.optim import parameter_groups
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]
SIZES: dict[str, Any] = {
    "block_size": 32, "vocab_size": 41, "num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 48, "intermediate_size": 64, "init_std": 0.3,
}  # fmt: skip


def test_hidden_matrices_have_smaller_weights_and_rates() -> None:
    plain, wide = (GPT(ModelConfig(**SIZES, mup_base_width=base, tied_lm_head=False)) for base in (0, 12))  # 4 times
    matrices = {spec.name for spec in wide.param_specs() if spec.kind == "matrix"}
    assert len(matrices) == 8
    for name, weight in wide.named_parameters():
        expected = plain.get_parameter(name) * (0.5 if name in matrices else 1)
        torch.testing.assert_close(weight, expected)
    for muon in (False, True):
        groups = parameter_groups(wide, wide.param_specs(), 0.1, width_mult=4.0, muon=muon)
        names = {id(p): name for name, p in wide.named_parameters()}
        for group in groups:
            for parameter in group["params"]:
                scaled = names[id(parameter)] in matrices and not muon
                assert group["lr_mult"] == (0.25 if scaled else 1.0)
                assert group["weight_decay"] in ((0.4,) if scaled else (0.1, 0.0))


def test_at_the_base_width_only_attention_differs() -> None:
    base, plain = (ModelConfig(**SIZES, mup_base_width=width) for width in (48, 0))
    assert (base.width_mult, base.output_scale) == (1.0, 1.0)
    assert base.query_scale == pytest.approx(12**-0.5)
    assert (plain.width_mult, plain.output_scale, plain.query_scale) == (1.0, 1.0, 1.0)


KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, biases": {"tied_lm_head": False, "qkv_bias": True},
    "query norm": {"qk_norm": True, "tied_lm_head": False},
    "layer norm": {"norm_type": "layer", "mlp_type": "gelu_tanh", "bias": True, "position_type": "learned"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_compute_the_same_without_multipliers(kind: str) -> None:
    model = redrawn(GPT(ModelConfig(**SIZES, **KINDS[kind], mup_base_width=16), dtype=torch.float64))
    weights = model.state_dict()
    folded = GPT(folded_config(model.config), dtype=torch.float64, seed=None)
    ids = torch.randint(41, (2, 9), generator=torch.Generator().manual_seed(3))
    folded.load_state_dict(weights)
    assert not torch.allclose(folded(ids), model(ids))
    folded.load_state_dict(folded_weights(model.config, weights))
    torch.testing.assert_close(folded(ids), model(ids), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_what_an_exported_model_does(tmp_path: Path, tied: bool) -> None:
    model = redrawn(GPT(ModelConfig(**SIZES, mup_base_width=16, tied_lm_head=tied)))
    export(write_run(tmp_path / "run", model), tmp_path / "out")
    ids = torch.randint(41, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "out")(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


FLAGS: tuple[object, ...] = ("--mup_base_width", 4, "--precision", "fp64", "--max_steps", 4, "--log_every", 1)


@pytest.mark.parametrize("layout", [(), ("--sep_size", 2), ("--no-use_distributed_optimizer", "--batch_size", 1)])
def test_it_trains_the_same_on_every_layout(ranks: Pools, tmp_path: Path, layout: tuple[object, ...]) -> None:
    one = ranks(1).run(train, Trainer, tmp_path / "one", *FLAGS)[0]
    two = ranks(2).run(train, Trainer, tmp_path / "two", *FLAGS, *layout)[0]
    assert losses(two.log) == pytest.approx(losses(one.log), rel=1e-10)
    plain = ranks(1).run(train, Trainer, tmp_path / "plain", *FLAGS, "--mup_base_width", 0)[0]
    assert losses(plain.log)[1] != pytest.approx(losses(one.log)[1], rel=1e-4)


def test_experts_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--mup_base_width 4 has no rule for routers and experts; use 0, or drop --use_moe"
    ):
        config_of("--use_moe", "--mup_base_width", 4)
