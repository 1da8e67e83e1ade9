"""LoRA in two phases: the second is the run that starts from the first one's weights; continued in both; mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, config_of, losses, read_logs
from tests.training.test_kl_divergence import FLAGS, ROWS, STEPS, S
from tinytron.checkpoint.load import read_file
from tinytron.config import configuration
from tinytron.data import MockDataset
from tinytron.errors import TinytronError
from tinytron.model import GPT
from tinytron.training import Config, Trainer
from tinytron.training.lora import LoraTrainer, LoraTrainerConfig

Pools = Callable[[int], Ranks]
BOUNDARY = 2
LORA: tuple[object, ...] = ("--lora_rank", 3, "--lora_alpha", 6, "--exp_name", "phases")


class Data:
    """All samples are one global batch."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = MockDataset(ROWS, S, 61, seed=3)
        self.val_dataset = MockDataset(3, S, 61, seed=4)


class Phases(Data, LoraTrainer[LoraTrainerConfig, GPT]):
    """With that data."""


class Plain(Data, Trainer):
    """With that data."""


def result(trainer: Any) -> Run:
    """Train it."""
    trainer.train()
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, None)


def run(log_dir: Path, *flags: object, tokens: int = BOUNDARY * ROWS * S) -> Run:
    """Train in two phases. A job for the pool."""
    with configuration({"training": {"pre_lora_tokens": tokens}}):
        trainer = Phases(config_of(*FLAGS, *LORA, "--log_dir", log_dir, *flags))
    return result(trainer)


def plain(log_dir: Path, *flags: object) -> Run:
    """Train by a plain trainer. A job for the pool."""
    return result(Plain(config_of(*FLAGS, "--log_dir", log_dir, *flags)))


@pytest.mark.parametrize(
    ("world", "flags"),
    [(1, ()), (2, ("--sep_size", 2)), (2, ("--no-use_distributed_optimizer", "--recompute", "full"))],
)
def test_the_second_phase_is_a_run_from_the_first_ones_weights(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...]
) -> None:
    both = ranks(world).run(run, tmp_path / "both", "--do_val", "--val_every_steps", 100, *flags)[0]
    first = ranks(1).run(plain, tmp_path / "first", "--max_steps", BOUNDARY)[0]
    weights = first.folder / f"{BOUNDARY:05d}_model.pt"
    more = ("--init_from", weights, *LORA, "--max_steps", STEPS - BOUNDARY)
    second = ranks(1).run(plain, tmp_path / "second", *more)[0]
    expected = [*losses(first.log).values(), *losses(second.log).values()]
    assert list(losses(both.log).values()) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[BOUNDARY]
    assert sorted(losses(both.log, "val")) == [BOUNDARY, STEPS]
    mine, theirs = (
        read_file(one.folder / f"{n:05d}_model.pt") for one, n in ((both, STEPS), (second, STEPS - BOUNDARY))
    )
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-7, atol=1e-10)


def test_continued_in_both_phases(ranks: Pools, tmp_path: Path) -> None:
    whole = ranks(2).run(run, tmp_path / "whole")[0]
    for steps in (1, BOUNDARY + 1, BOUNDARY + 2):
        folder = tmp_path / f"parts{steps}"
        ranks(2).run(run, folder, "--max_steps", max(steps, BOUNDARY + 1))
        parts = ranks(2).run(run, folder)[0]
        one, other = (read_file(found.folder / f"{STEPS:05d}_model.pt") for found in (whole, parts))
        assert all(torch.equal(one[name], other[name]) for name in one)
    # The newest checkpoint is damaged, and the one before it is of the first phase.
    (whole.folder / f"{STEPS:05d}_model.pt").write_bytes(b"damaged")
    again = ranks(2).run(run, tmp_path / "whole")[0]
    one = read_file(again.folder / f"{STEPS:05d}_model.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


def _error_of(log_dir: Path, *flags: object, tokens: int = 1) -> str:
    try:
        run(log_dir, *flags, tokens=tokens)
    except TinytronError as error:
        return str(error)
    return ""


def test_mistakes(tmp_path: Path) -> None:
    assert _error_of(tmp_path, tokens=0).startswith("training.pre_lora_tokens=0 must be at least 1; use half of")
    assert _error_of(tmp_path, tokens=10**6).startswith(
        f"training.pre_lora_tokens=1000000 is {-(-(10**6) // (ROWS * S))} steps, but the run has {STEPS}; use at most "
    )
    text = "needs adapters for its second phase; give --lora_rank 16"
    assert text in _error_of(tmp_path, "--lora_rank", 0, "--lora_alpha", 16)
