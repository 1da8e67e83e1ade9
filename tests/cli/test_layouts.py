"""The must-hold commands: the same losses from the same script for every number of processes and every layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.runs import losses, run_ranks, run_well

BASE = [
    *("--exp_name", "layouts", "--deterministic", "--precision", "fp32", "--use_mock_data", "--debug"),
    *("--mock_data_num_samples", "48", "--total_batch_size", "384", "--seq_len", "24", "--block_size", "24"),
    *("--vocab_size", "61", "--num_layer", "2", "--num_attention_heads", "4", "--num_key_value_heads", "2"),
    *("--hidden_size", "16", "--intermediate_size", "32", "--init_std", "0.1", "--max_lr", "0.005", "--log_every", "1"),
    *("--warmup_steps", "1"),
]
# With this seed no token is at a near tie of the router in these three steps, which in fp32 could go another way.
MODELS = {
    "dense": [],
    "moe": [
        *("--use_moe", "--num_experts", "4", "--num_experts_per_tok", "2", "--moe_intermediate_size", "16"),
        *("--moe_aux_loss_scope", "sequence", "--moe_aux_loss_coef", "0.05"),
    ],
}
SEQUENCES, ACCUMULATIONS = 16, (1, 4)
LAYOUTS = [(world, sep, ep) for world in (1, 4) for sep, ep in itertools.product((1, 2, 4), (1, 2, 4))]
ALL = [
    (model, world, sep, ep, accumulation)
    for model, (world, sep, ep), accumulation in itertools.product(MODELS, LAYOUTS, ACCUMULATIONS)
    if sep <= world and ep <= world and (model == "moe" or ep == 1)
]
# Every size of every axis, by both models and accumulations.
QUICK = {("dense", 4, 4, 1, 1), ("moe", 4, 1, 2, 4), ("moe", 4, 2, 4, 4)}

Place = tuple[str, int, int, int, int]


def _flags(model: str, world: int, sep: int, ep: int, accumulation: int) -> list[str]:
    batch = SEQUENCES // (world // sep) // accumulation
    return [*BASE, *MODELS[model], "--sep_size", str(sep), "--ep_size", str(ep), "--batch_size", str(batch)]


def _losses(folder: Path) -> dict[int, float]:
    (log,) = folder.glob("log/*/log.txt")
    return losses(log.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Place], dict[int, float]]:
    """The losses of a run, which is made when a test first asks for it."""
    made: dict[Place, dict[int, float]] = {}

    def get(place: Place) -> dict[int, float]:
        if place not in made:
            folder = tmp_path_factory.mktemp("run")
            finished = run_ranks(*_flags(*place), cwd=folder, world=place[1])
            assert (finished.code, finished.stderr) == (0, ""), finished
            made[place] = _losses(folder)
        return made[place]

    return get


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, marks=[] if p in QUICK else [pytest.mark.slow], id="-".join(map(str, p))) for p in ALL],
)
def test_every_layout_logs_the_losses_of_one_process(
    trained: Callable[[Place], dict[int, float]], place: Place
) -> None:
    one = trained((place[0], 1, 1, 1, 1))
    assert list(one) == [1, 2, 3]
    assert len(set(one.values())) == 3
    assert trained(place) == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("place", [("moe", 4, 2, 4, 4)], ids=["moe"])
def test_under_the_launcher(trained: Callable[[Place], dict[int, float]], tmp_path: Path, place: Place) -> None:
    finished = run_well(*_flags(*place), cwd=tmp_path, processes=4)
    assert finished.stderr == ""
    assert _losses(tmp_path) == trained(place)  # deterministic: not a bit is another
