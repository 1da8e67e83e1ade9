"""P9, P10: a run that died and was started again is the run that did not, on any number of processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses
from tests.helpers.stopping import StoppingTrainer, run_until, whole
from tinytron.training import Config

Pools = Callable[[int], Ranks]
RUN: tuple[object, ...] = (
    "--max_steps",
    6,
    "--do_val",
    "--val_every_steps",
    2,
    "--save_every_steps",
    2,
    "--log_every",
    4,
)
KINDS: dict[str, tuple[object, ...]] = {
    "fp32": (),
    "fp64": ("--precision", "fp64", "--log_every", 1),  # lines after the checkpoint are there already
    "bf16_dropout": ("--precision", "bf16", "--dropout", 0.2),
    "fp16": ("--precision", "fp16", "--init_std", 1.0),  # the first steps overflow: the scale is part of the state
    "replicated": ("--no-use_distributed_optimizer", "--dropout", 0.2),
    "epochs": ("--mock_data_num_samples", 12),  # a step straddles two epochs
    "rates": ("--weight_decay_schedule", "cosine", "--lr_schedule", "cosine_rewarm", "--lr_stages", 0.5),
    "averages": ("--ema_decay", 0.8, "--precision", "bf16", "--layer_lr_decay", 0.5),
    "batches": ("--batch_warmup_sizes", 24, 48, "--batch_warmup_ends", 1, 4, "--batch_size", 1),
    "workers": ("--num_workers", 2, "--dropout", 0.2),
}


CELLS = [(world, kind) for world in (1, 2) for kind in KINDS]


@pytest.mark.parametrize(
    ("world", "kind"), [pytest.param(*c, marks=[pytest.mark.slow] if c[1] == "workers" else []) for c in CELLS]
)
@pytest.mark.sample(6)
def test_a_resumed_run_is_bit_identical(ranks: Pools, tmp_path: Path, world: int, kind: str) -> None:
    flags, patience = (*RUN, *KINDS[kind]), 300 if kind == "workers" else 60  # eight processes that each load torch
    unbroken = ranks(world).run(run_until, tmp_path / "unbroken", 0, *flags, timeout=patience)
    broken: list[Any] = []
    for stop in (2, 3, 5, 0):  # after a save, between two (twice), and to the end
        broken = ranks(world).run(run_until, tmp_path / "broken", stop, *flags, timeout=patience)
    assert broken[0].log == unbroken[0].log
    assert list(losses(unbroken[0].log)) == [1, 2, 3, 4, 5, 6]
    _assert_equal(whole(broken), whole(unbroken))
    pair = [torch.load(runs[0].folder / "00006_model.pt", weights_only=True) for runs in (broken, unbroken)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[1])


def _assert_equal(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for key, values in theirs.items():
        np.testing.assert_array_equal(mine[key], values, err_msg=key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("saved_on", [1, 2, 4])
@pytest.mark.sample(3)
def test_states_load_bit_equal_on_any_world(ranks: Pools, tmp_path: Path, saved_on: int, precision: str) -> None:
    """Main weights, both moments and the step counter; and the weights the model computes with."""
    flags = ("--max_steps", 2, "--precision", precision)
    saved = whole(ranks(saved_on).run(run_until, tmp_path, 0, *flags))
    assert {key.rsplit("/")[-1] for key in saved} == {"main", "exp_avg", "exp_avg_sq", "step"}
    assert all((values == 2).all() for key, values in saved.items() if key.endswith("/step"))
    for world in (1, 2, 4):
        loaded = ranks(world).run(run_until, tmp_path, 0, *flags)  # already trained: loads, and does no step
        assert {result.step for result in loaded} == {2}
        _assert_equal(whole(loaded), saved)
    loaded = ranks(2).run(run_until, tmp_path, 0, *flags, "--no-use_distributed_optimizer")
    _assert_equal(whole(loaded[:1]), saved)


def test_training_goes_on_on_other_worlds(ranks: Pools, tmp_path: Path) -> None:
    unbroken = ranks(1).run(run_until, tmp_path / "unbroken", 0, *RUN)[0]
    for world, stop in ((2, 2), (1, 4), (4, 0)):
        moved = ranks(world).run(run_until, tmp_path / "moved", stop, *RUN)[0]
        assert moved.step == (stop or 6)
    assert losses(moved.log) == pytest.approx(losses(unbroken.log), rel=1e-5)
    assert losses(moved.log, "val") == pytest.approx(losses(unbroken.log, "val"), rel=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "bf16_dropout"])
def test_two_runs_are_bit_identical(ranks: Pools, tmp_path: Path, kind: str) -> None:
    flags = (*RUN, *KINDS[kind], "--deterministic")
    first, second = (ranks(2).run(run_until, tmp_path / name, 0, *flags) for name in ("first", "second"))
    assert first[0].log == second[0].log
    _assert_equal(whole(first), whole(second))


class Drawing(StoppingTrainer):
    """Draws from every generator in each step, as a user's loss or augmentation may."""

    def _lr_scheduler(self, step: int) -> float:
        self.drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        (Path(self.config.logging.log_dir) / f"{step}_{self.state.rank}").write_text(str(self.drawn))
        return super()._lr_scheduler(step)

    def _init_dataset(self, config: Config) -> None:
        super()._init_dataset(config)
        Path(config.logging.log_dir).mkdir(exist_ok=True)


def test_every_generator_goes_on_where_it_was(ranks: Pools, tmp_path: Path) -> None:
    def drawn(name: str) -> list[str]:
        return [(tmp_path / name / f"{step}_{rank}").read_text() for step in range(6) for rank in range(2)]

    ranks(2).run(_draw, tmp_path / "unbroken", 0)
    for stop in (3, 4, 0):
        ranks(2).run(_draw, tmp_path / "broken", stop)
    assert drawn("broken") == drawn("unbroken")
    assert len(set(drawn("unbroken"))) == 12


def _draw(log_dir: Path, stop_after: int) -> None:
    run_until(log_dir, stop_after, *RUN, cls=Drawing)


def test_a_finished_run_is_not_touched_and_can_be_prolonged(ranks: Pools, tmp_path: Path) -> None:
    flags = (*RUN, "--lr_schedule", "constant")
    done = ranks(1).run(run_until, tmp_path, 0, *flags)[0]
    assert ranks(1).run(run_until, tmp_path, 0, *flags)[0].log == done.log
    longer = ranks(1).run(run_until, tmp_path, 0, *flags, "--max_steps", 8)[0]
    assert longer.log.startswith(done.log)
    assert list(losses(longer.log)) == list(range(1, 9))
