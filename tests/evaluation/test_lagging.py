"""Lagging evaluation: the loss and accuracy of today's weights on the batches of earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, read_logs, user_error, whole_weights
from tinytron.data import MockDataset
from tinytron.data.permutation import Permutation
from tinytron.model import GPT
from tinytron.training import Trainer
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
S, V, SEED, SAMPLES, BATCH = 12, 61, 1337, 32, 8
FLAGS = (*TINY, "--precision", "fp64", "--max_epochs", 2, "--lr_schedule", "constant")
LAG = ("--eval_tasks", "lagging", "--eval_every", 2)
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "one": (1, ()),
    "dp 2": (2, ("--num_workers", 1)),
    "sep 2": (2, ("--sep_size", 2)),
    "dp 2 x sep 2": (4, ("--sep_size", 2)),
    "experts, ep 2": (
        2,
        (*("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2), "--moe_intermediate_size", 8, "--ep_size", 2),
    ),
}


def run(log_dir: Path, *flags: object) -> Run:
    """Train; ``extra`` are the final weights. A job for the pool."""
    trainer = Trainer(config_of(*FLAGS, "--log_dir", log_dir, *flags))
    trainer.train()
    weights = whole_weights(trainer)
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, weights)


def samples_of(step: int) -> list[int]:
    """The samples of a step (from 0), by a permutation of every epoch."""
    positions = range(step * BATCH, (step + 1) * BATCH)
    return [int(Permutation(SAMPLES, SEED, at // SAMPLES)(torch.tensor([at % SAMPLES]).numpy())[0]) for at in positions]


def naive(weights: dict[str, torch.Tensor], flags: tuple[object, ...], step: int) -> tuple[float, float]:
    """Loss and accuracy of the whole batch of a step, from logits of one process."""
    model = GPT(config_of(*FLAGS, *flags, "--ep_size", 1).model, dtype=torch.float64)
    model.load_state_dict(weights)
    data = MockDataset(SAMPLES, S, V, seed=SEED)
    picked = [data[index] for index in samples_of(step)]
    ids, labels = (torch.stack([one[name] for one in picked]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits: Any = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    valid = labels != IGNORE_INDEX
    return float(loss), float((logits.argmax(-1) == labels)[valid].double().mean())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(3)
def test_they_are_those_of_the_batches_of_earlier_steps(ranks: Pools, tmp_path: Path, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    result = ranks(world).run(run, tmp_path, *LAG, *flags)[0]
    records = {record["step"]: record for record in result.records if record["stage"] == "eval"}
    assert max(records) == result.step == 8
    for step, agos in ((2, (0, 1)), (4, (0, 1)), (6, (0, 1, 4)), (8, (0, 1, 4))):
        names = {f"{name}_back_{ago}" for name in ("loss", "accuracy") for ago in agos}
        assert records[step].keys() - {"step", "stage", "task"} == names
    for ago in (0, 1, 4):
        loss, accuracy = naive(result.extra, flags, result.step - 1 - ago)
        assert records[8][f"loss_back_{ago}"] == pytest.approx(loss, rel=1e-9)
        assert records[8][f"accuracy_back_{ago}"] == pytest.approx(accuracy, abs=1e-12)


def test_it_changes_nothing_and_a_resumed_run_logs_the_same(ranks: Pools, tmp_path: Path) -> None:
    whole = ranks(1).run(run, tmp_path / "whole", *LAG)[0]
    without = ranks(1).run(run, tmp_path / "without")[0]
    assert all(torch.equal(without.extra[name], value) for name, value in whole.extra.items())
    ranks(1).run(run, tmp_path / "parts", *LAG, "--max_steps", 4)
    parts = ranks(1).run(run, tmp_path / "parts", *LAG, "--max_steps", 8)[0]
    of = [[record for record in one.records if record["stage"] == "eval"] for one in (whole, parts)]
    assert of[0] == of[1]


class OwnLoader(Trainer):
    """Reads batches in an order that we do not know."""

    def _init_dataset(self, config: Any) -> None:
        self.train_loader = DataLoader(MockDataset(SAMPLES, S, V, seed=1), batch_size=2, shuffle=True)


class Stream(Trainer):
    """Cannot go back."""

    def _init_dataset(self, config: Any) -> None:
        class Endless(torch.utils.data.IterableDataset[Any]):
            def __iter__(self) -> Iterator[Any]:
                data = MockDataset(SAMPLES, S, V, seed=1)
                return (data[index % SAMPLES] for index in range(10**6))

        self.train_dataset = Endless()


@pytest.mark.parametrize("cls", [OwnLoader, Stream])
def test_an_order_of_the_users_is_refused(ranks: Pools, tmp_path: Path, cls: type[Trainer]) -> None:
    flags = ("--eval_tasks", "lagging", "--eval_every", 1, "--max_steps", 2)
    (error,) = ranks(1).run(user_error, cls, tmp_path, *flags)
    assert error.startswith("ConfigError: the batches of earlier steps can only be read again from a dataset with")
