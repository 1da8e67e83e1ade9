"""``--batch_warmup_sizes``: a growing global batch trains as one process does on the same samples, on every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, train, user_error
from tests.naive.gpt import Shape
from tests.naive.training import Recipe
from tests.naive.training import train as naive
from tinytron.distributed.layout import ParallelLayout
from tinytron.model import GPT
from tinytron.training import Trainer
from tinytron.training.derive import data_position, derive, with_fitting_batch
from tinytron.utils.batch_sizes import Skips

Pools = Callable[[int], Ranks]
GROWING: tuple[object, ...] = ("--batch_warmup_sizes", 24, 48, "--batch_warmup_ends", 1, 3)  # 2, 4, 4, 8, 8 sequences
RUN: tuple[object, ...] = (*GROWING, "--max_steps", 5, "--precision", "fp64", "--log_every", 1, "--warmup_steps", 2)


class Growing(Trainer):
    """Tells the batches that belong to its steps, and how many micro-batches it was given of each."""

    def _init_metrics(self, config: Any) -> None:
        super()._init_metrics(config)
        assert self.train_sampler is not None
        assert self.train_dataset is not None
        samples = [self.train_sampler.samples_of_step(step) for step in range(5)]
        assert [len(of_step) for of_step in samples] == [2, 4, 4, 8, 8]
        pairs = [[self.train_dataset[n] for n in of_step] for of_step in samples]
        columns = ("input_ids", "labels")
        self.batches = [[torch.stack([row[c] for row in rows]).numpy() for c in columns] for rows in pairs]
        self.counts: list[int] = []

    def train_step(self, microbatches: Any) -> None:
        self.counts.append(len(microbatches))
        super().train_step(microbatches)

    def report(self) -> tuple[Any, ...]:
        return self.batches, self.counts


@pytest.mark.parametrize(
    ("world", "flags", "counts"),
    [
        (1, ("--batch_size", 2), [1, 2, 2, 4, 4]),
        (2, ("--batch_size", 1, "--no-use_distributed_optimizer"), [1, 2, 2, 4, 4]),
        (2, ("--batch_size", 1, "--sep_size", 2), [2, 4, 4, 8, 8]),
    ],
)
def test_growing_batches_train_as_the_twin_does(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...], counts: list[int]
) -> None:
    results = ranks(world).run(train, Growing, tmp_path, *RUN, *flags, "--min_lr", 0.001)
    batches, found = results[0].extra
    assert found == counts
    recipe = Recipe(max_lr=0.01, min_lr=0.001, warmup=2, clip=1.0)
    whole = [tuple(torch.from_numpy(part) for part in batch) for batch in batches]
    config = config_of(*TINY, *RUN)
    weights = GPT(config.model, dtype=torch.float64, seed=config.seed.seed).state_dict()
    twin = naive(weights, whole, Shape(2, 4, 2), recipe)
    records = [record for record in results[0].records if record["stage"] == "train"]
    assert [record["loss"] for record in records] == pytest.approx(twin.losses, rel=1e-10)
    assert [record["grad_norm"] for record in records] == pytest.approx(twin.norms, rel=1e-10)


def test_the_length_of_a_run_counts_the_smaller_batches() -> None:
    config = config_of(
        "--seq_len", 12, "--total_batch_size", 96, "--batch_size", 2, *GROWING, "--max_train_tokens", 217
    )
    layout = ParallelLayout(1)
    assert derive(config, layout, 1000).max_steps == 5  # 24 + 48 + 48 + 96 = 216 tokens are four steps
    assert [data_position(config, step, Skips())["tokens"] for step in range(6)] == [0, 24, 72, 120, 216, 312]
    epochs = config_of("--seq_len", 12, "--total_batch_size", 96, "--batch_size", 2, *GROWING, "--max_epochs", 2)
    assert derive(epochs, layout, 13).max_steps == 5  # 26 sequences are 2 + 4 + 4 + 8 + 8
    assert derive(epochs, layout, 12).max_steps == 4
    assert derive(config, layout, 1000).notes[-1] == "tokens per step: 24 until step 1, 48 until step 3, then 96"


def test_a_fitted_micro_batch_divides_all_sizes() -> None:
    config = config_of("--seq_len", 12, "--total_batch_size", 96, "--batch_size", 8, *GROWING, "--fit_batch")
    assert with_fitting_batch(config, ParallelLayout(1)).train.batch_size == 2
    assert with_fitting_batch(config, ParallelLayout(2)).train.batch_size == 1


def test_a_size_that_does_not_divide_over_the_ranks_is_refused(ranks: Pools, tmp_path: Path) -> None:
    text = (
        "ConfigError: --batch_warmup_sizes 24 (tokens) must be a multiple of --batch_size x --seq_len x data-parallel "
        "ranks = 2 x 12 x 2 = 48; use 48, or a smaller --batch_size"
    )
    assert ranks(2).run(user_error, Trainer, tmp_path, *GROWING, "--max_steps", 5) == [text, text]
