"""P10 with experts, sequence parallelism and Muon: saved on one layout, loaded on any other."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of
from tests.helpers.stopping import run_until, whole
from tinytron.model import GPT

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 12, "--first_k_dense", 1),
    *("--num_layer", 3, "--num_shared_experts", 1, "--moe_bias_update_rate", 0.02, "--moe_z_loss_coef", 0.01),
    *("--lr_schedule", "constant", "--save_every_steps", 3, "--log_every", 1, "--precision", "fp64", "--batch_size", 1),
)
OPTIMIZERS: dict[str, tuple[object, ...]] = {
    "adam": (),
    "muon": ("--optimizer", "muon", "--max_lr", 0.02),
    "normuon": ("--optimizer", "muon", "--muon_normuon", "--muon_cautious", "--ema_decay", 0.7),
}
SAVED_ON = (4, 2, 4)  # world, sep, ep
LAYOUTS = [
    *[(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 4, 2), (4, 1, 1), (4, 2, 4)],
    pytest.param(8, 2, 4, marks=pytest.mark.slow),
]


def _layout(sep: int, ep: int) -> tuple[object, ...]:
    return ("--sep_size", sep, "--ep_size", ep)


class Saved:
    """A run that died after 3 steps, and the one-process run that did not."""

    def __init__(self, ranks: Pools, folder: Path, optimizer: str) -> None:
        self.flags = (*FLAGS, *OPTIMIZERS[optimizer])
        self.folder = folder / "saved"
        world, sep, ep = SAVED_ON
        self.runs = ranks(world).run(run_until, self.folder, 3, *self.flags, *_layout(sep, ep), "--max_steps", 6)
        self.unbroken: Run = ranks(1).run(run_until, folder / "unbroken", 0, *self.flags, "--max_steps", 6)[0]


@pytest.fixture(scope="module")
def saved(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """By optimizer, made once; not to be changed."""
    made: dict[str, Saved] = {}

    def get(optimizer: str) -> Saved:
        if optimizer not in made:
            made[optimizer] = Saved(ranks, tmp_path_factory.mktemp(optimizer), optimizer)
        return made[optimizer]

    return get


def _values(run: Run, *names: str) -> list[float]:
    return [record[name] for record in run.records if record["stage"] == "train" for name in names]


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("muon", marks=pytest.mark.slow), "normuon"])
@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
@pytest.mark.sample(4)
def test_any_layout_loads_all_states_and_goes_on(
    ranks: Pools, saved: Callable[[str], Saved], tmp_path: Path, world: int, sep: int, ep: int, optimizer: str
) -> None:
    run = saved(optimizer)
    shutil.copytree(run.folder, tmp_path / "log")
    flags = (*run.flags, *_layout(sep, ep), *(("--no-use_distributed_optimizer",) if (world, sep) == (4, 1) else ()))
    loaded = ranks(world).run(run_until, tmp_path / "log", 0, *flags, "--max_steps", 3)  # trained: loads, does no step
    assert {result.step for result in loaded} == {3}
    mine, theirs = whole(loaded), whole(run.runs)
    assert mine.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    went_on = ranks(world).run(run_until, tmp_path / "log", 0, *flags, "--max_steps", 6)[0]
    names = ("loss", "grad_norm", "moe_balance", "moe_z")
    assert _values(went_on, *names) == pytest.approx(_values(run.unbroken, *names), rel=1e-10)
    last = [torch.load(r.folder / "00006_model.pt", weights_only=True) for r in (went_on, run.unbroken)]
    assert last[0].keys() == last[1].keys()
    for name, weight in last[1].items():
        torch.testing.assert_close(last[0][name], weight, rtol=1e-9, atol=1e-11)


def test_states_are_of_the_expected_kinds(saved: Callable[[str], Saved]) -> None:
    kinds = {name: {key.rsplit("/")[-1] for key in whole(saved(name).runs)} for name in OPTIMIZERS}
    assert kinds["adam"] == {"main", "exp_avg", "exp_avg_sq", "step"}
    assert kinds["muon"] == kinds["adam"] | {"momentum_buffer"}
    assert kinds["normuon"] == kinds["muon"] | {"second_moment", "ema"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_weights_file_is_the_whole_model(saved: Callable[[str], Saved], optimizer: str) -> None:
    """By plain torch.load: all experts, each its own, and what the ranks trained."""
    run = saved(optimizer)
    weights = torch.load(run.runs[0].folder / "00003_model.pt", weights_only=True)
    model = GPT(config_of(*TINY, *run.flags).model, dtype=torch.float64, seed=99)
    model.load_state_dict(weights)
    mains = {key: values for key, values in whole(run.runs).items() if key.endswith("/main")}
    assert {key.removesuffix("/main") for key in mains} == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy().flatten(), mains[f"{name}/main"])
    for layer in (1, 2):
        for matrix in ("gate_up_proj", "down_proj"):
            experts = weights[f"blocks.{layer}.mlp.experts.{matrix}"]
            assert len(experts) == 4
            for a, b in itertools.combinations(experts, 2):
                assert (a != b).double().mean() > 0.99
        assert weights[f"blocks.{layer}.mlp.router.bias"].abs().sum() > 0


def _trained(ranks: Pools, folder: Path, *layout: Any) -> Any:
    world, *rest = layout
    return ranks(world).run(run_until, folder, 0, *FLAGS, "--precision", "bf16", "--max_steps", 2, *_layout(*rest))


@pytest.mark.parametrize(("first", "second"), [((4, 2, 4), (2, 1, 1)), ((1, 1, 1), (4, 4, 4)), ((2, 1, 2), (4, 1, 4))])
def test_bf16_runs_keep_their_main_weights(ranks: Pools, tmp_path: Path, first: Any, second: Any) -> None:
    before, after = (whole(_trained(ranks, tmp_path, *layout)) for layout in (first, second))
    assert before.keys() == after.keys()
    for key, values in before.items():
        np.testing.assert_array_equal(after[key], values, err_msg=key)
        assert values.dtype == np.float32
