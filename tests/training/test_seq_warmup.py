"""``--seq_warmup_lens``: cut sequences train as one process does on the short rows, on every layout; mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses, train
from tests.naive.gpt import Shape
from tests.naive.training import Recipe
from tests.naive.training import train as naive
from tinytron.checkpoint.load import read_file
from tinytron.data import Batch
from tinytron.data.batch import split_rows
from tinytron.errors import ConfigError
from tinytron.model import GPT
from tinytron.training import Trainer
from tinytron.training.contrastive import ContrastiveTrainer

Pools = Callable[[int], Ranks]
LENGTHS = (4, 6, 6, 12, 12)
GROWING: tuple[object, ...] = ("--seq_warmup_lens", 4, 6, "--seq_warmup_ends", 1, 3)
RUN: tuple[object, ...] = (*GROWING, "--max_steps", 5, "--precision", "fp64", "--log_every", 1, "--warmup_steps", 2)


class Growing(Trainer):
    """Tells the samples of its steps."""

    def report(self) -> list[list[Any]]:
        assert self.train_sampler is not None
        assert self.train_dataset is not None
        pairs = [[self.train_dataset[n] for n in self.train_sampler.samples_of_step(step)] for step in range(5)]
        columns = ("input_ids", "labels")
        return [[torch.stack([row[c] for row in rows]).numpy() for c in columns] for rows in pairs]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ()),
        (2, ("--no-use_distributed_optimizer", "--recompute", "full")),
        (2, ("--sep_size", 2)),
        (4, ("--sep_size", 2)),
    ],
)
@pytest.mark.sample(3)
def test_growing_sequences_train_as_the_twin_does(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...]
) -> None:
    results = ranks(world).run(train, Growing, tmp_path, *RUN, *flags, "--min_lr", 0.001)
    whole = [
        tuple(torch.from_numpy(part).reshape(-1, length) for part in batch)
        for batch, length in zip(results[0].extra, LENGTHS, strict=True)
    ]
    config = config_of(*TINY, *RUN)
    weights = GPT(config.model, dtype=torch.float64, seed=config.seed.seed).state_dict()
    twin = naive(weights, whole, Shape(2, 4, 2), Recipe(max_lr=0.01, min_lr=0.001, warmup=2, clip=1.0))
    records = [record for record in results[0].records if record["stage"] == "train"]
    assert [record["loss"] for record in records] == pytest.approx(twin.losses, rel=1e-10)
    assert [record["grad_norm"] for record in records] == pytest.approx(twin.norms, rel=1e-10)


def test_continued_bit_equal(ranks: Pools, tmp_path: Path) -> None:
    def go(name: str, *flags: object) -> Run:
        return ranks(2).run(
            train, Trainer, tmp_path / name, *RUN, "--lr_schedule", "constant", "--warmup_steps", 1, *flags
        )[0]

    whole = go("whole")
    go("parts", "--max_steps", 2)
    parts = go("parts")
    assert {step: losses(parts.log)[step] for step in (3, 4, 5)} == {s: losses(whole.log)[s] for s in (3, 4, 5)}
    one, other = (read_file(run.folder / "00005_model.pt") for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_of_all_fields() -> None:
    """Positions begin at 0 in every row; what belongs to a row is repeated."""
    ids = torch.arange(12).view(2, 6)
    batch = Batch(
        ids, ids + 1, weights=ids.float(), positions=torch.tensor([[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]]),
        padding=ids > 9, sources=torch.tensor([5, 7]), extras={"a": ids[..., None], "b": torch.tensor([1.0, 2.0])},
    )  # fmt: skip
    found = split_rows(batch, 3)
    assert found.input_ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert torch.equal(found.labels, found.input_ids + 1)
    assert found.positions is not None
    assert found.positions.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 1], [0, 1, 2]]
    assert found.weights is not None
    assert found.weights.tolist() == found.input_ids.tolist()
    assert found.sources is not None
    assert found.sources.tolist() == [5, 5, 7, 7]
    assert found.extras["a"].shape == (4, 3, 1)
    assert found.extras["b"].tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ("--seq_warmup_lens", 4),
            "--seq_warmup_lens has 1 lengths, and --seq_warmup_ends 0 numbers of steps; give one",
        ),
        (("--seq_warmup_lens", 4, "--seq_warmup_ends", 0), "--seq_warmup_ends 0 must be increasing numbers of steps"),
        (
            ("--seq_warmup_lens", 5, "--seq_warmup_ends", 3),
            r"5 must divide --seq_len 12; use one of \[1, 2, 3, 4, 6, 12\]",
        ),
        (
            ("--seq_warmup_lens", 3, "--seq_warmup_ends", 3, "--sep_size", 2),
            r"3 must divide --seq_len 12, and a multiple of --sep_size 2; use one of \[2, 4, 6, 12\]",
        ),
    ],
)
def test_mistakes(flags: tuple[object, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config_of(*TINY, *flags)


def test_pairs_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="--seq_warmup_lens 4 6 cuts sequences, but here each is a pair; drop it"):
        ContrastiveTrainer(config_of(*TINY, *RUN))
