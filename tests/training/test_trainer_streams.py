"""Samples as a training step sees them: resumption on other world sizes, limits, weights, data sets without numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses, train, user_error
from tinytron.data import Batch, GlobalBatchSampler, Shard, ShuffledEpochs, TokenShardDataset, write_shard
from tinytron.data.functions import FunctionLoader, data_loader
from tinytron.training import Config, Trainer

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


def shards(folder: Path, tokens: int = 401, name: str = "train_000000.bin", seed: int = 1) -> Path:
    """A folder with one shard of random tokens: two samples of 12 are never alike."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / name, np.random.default_rng(seed).integers(0, 61, tokens))
    return folder


def read(data: Path) -> tuple[object, ...]:
    return ("--no-use_mock_data", "--dataset_path", data)


class Recording(Trainer):
    """Remembers the first six tokens of the rows that this rank trained on: those that no other rank of its sequence
    group has."""

    def train_step(self, microbatches: list[Batch]) -> None:
        self.__dict__.setdefault("rows", []).append(
            [tuple(row[:6].tolist()) for batch in microbatches for row in batch.input_ids] if self.sp_rank == 0 else []
        )
        super().train_step(microbatches)

    def report(self) -> Any:
        return self.__dict__.get("rows", [])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_moves_to_other_world_sizes_reads_each_sample_once(
    ranks: Pools, tmp_path: Path, workers: int
) -> None:
    """33 samples, 8 a step: 12 steps are almost three epochs, and batches straddle their ends."""
    data = shards(tmp_path / "data")
    walk: list[Any] = []
    parts = [(1, 3, ()), (2, 6, ("--batch_size", 4)), (4, 9, ("--batch_size", 1)), (4, 12, ("--sep_size", 2))]
    for world, steps, flags in parts if not workers else parts[:2]:
        options = (
            "--no-use_mock_data",
            "--dataset_path",
            data,
            "--max_steps",
            steps,
            "--lr_schedule",
            "constant",
            "--num_workers",
            workers,
        )
        runs = ranks(world).run(train, Recording, tmp_path / "log", *options, *flags)
        done = len(walk)
        assert runs[0].step == steps
        assert {len(run.extra) for run in runs} == {steps - done}
        walk += [[row for run in runs for row in run.extra[step]] for step in range(steps - done)]
    dataset = TokenShardDataset([Shard(data / "train_000000.bin")], 12, 61)
    sampler = GlobalBatchSampler(ShuffledEpochs(33, 1337), global_batch=8, micro_batch=1, dp_rank=0, dp_size=1)
    for step, rows in enumerate(walk):
        expected = [tuple(dataset[n]["input_ids"][:6].tolist()) for n in sampler.samples_of_step(step)]
        assert sorted(rows) == sorted(expected)
    flat = [row for rows in walk for row in rows]
    assert len(set(flat[:33])) == min(33, len(flat))  # the first epoch: every sample once


def test_prefetching_changes_nothing(ranks: Pools, tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    logs = [
        ranks(2).run(train, Recording, tmp_path / str(depth), *read(data), "--prefetch", depth)[0]
        for depth in (0, 1, 5)
    ]
    assert logs[0].log == logs[1].log == logs[2].log
    assert logs[0].extra == logs[1].extra == logs[2].extra


@WORLDS
def test_token_limits_are_those_of_all_ranks_together(ranks: Pools, tmp_path: Path, world: int) -> None:
    """96 tokens a step: 200 tokens are three steps; 50 validation tokens are five samples of 12, however many ranks."""
    data = shards(tmp_path / "data")
    shards(data, name="val_000000.bin", seed=2)
    limits = ("--max_train_tokens", 200, "--do_val", "--max_eval_tokens", 50)
    run = ranks(world).run(train, Trainer, tmp_path / "log", *read(data), *limits)[0]
    assert run.step == 3
    assert run.records[-1]["tokens"] == 60
    alone = ranks(1).run(train, Trainer, tmp_path / "one", *read(data), *limits)[0]
    assert losses(run.log, "val") == pytest.approx(losses(alone.log, "val"), rel=1e-5)


def test_steps_hold_before_tokens(ranks: Pools, tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    for steps in (2, 5):  # 200 tokens would be three
        limits = ("--max_train_tokens", 200, "--max_steps", steps)
        assert ranks(1).run(train, Trainer, tmp_path / str(steps), *read(data), *limits)[0].step == steps


# Iterable data sets.


class Rows(IterableDataset[Any]):
    def __init__(self, count: int = 30, seed: int = 5) -> None:
        self.tokens = np.random.default_rng(seed).integers(0, 61, (count, 13))

    def __iter__(self) -> Iterator[Any]:
        yield from self.tokens


class OfAStream(Recording):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset, self.val_dataset = Rows(), Rows(11, seed=6)


@WORLDS
def test_a_stream_is_trained_and_validated_on_in_every_world(ranks: Pools, tmp_path: Path, world: int) -> None:
    runs = ranks(world).run(train, OfAStream, tmp_path / "log", "--max_steps", 5, "--do_val")
    rows = [row for step in range(5) for row in sorted(row for run in runs for row in run.extra[step])]
    walk = [tuple(Rows().tokens[n % 30][:6].tolist()) for n in range(40)]
    assert rows == [row for step in range(5) for row in sorted(walk[8 * step : 8 * step + 8])]
    assert runs[0].records[-1]["tokens"] == 11 * 12
    alone = ranks(1).run(train, OfAStream, tmp_path / "one", "--max_steps", 5, "--do_val")[0]
    for stage in ("train", "val"):
        assert losses(runs[0].log, stage) == pytest.approx(losses(alone.log, stage), rel=1e-5)


def test_a_stream_goes_on_where_it_was(ranks: Pools, tmp_path: Path) -> None:
    whole = ranks(2).run(train, OfAStream, tmp_path / "whole", "--max_steps", 6, "--lr_schedule", "constant")[0]
    for steps in (2, 6):
        part = ranks(2).run(train, OfAStream, tmp_path / "part", "--max_steps", steps, "--lr_schedule", "constant")[0]
    assert part.log == whole.log


class Watched(Rows):
    read = 0

    def __iter__(self) -> Iterator[Any]:
        for row in super().__iter__():
            self.read += 1
            yield row


class ReadAhead(Trainer):
    """Waits in every step until the rows of the next one have been read, and counts them."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Watched()

    def train_step(self, microbatches: list[Batch]) -> None:
        deadline = time.monotonic() + 20
        while self.train_dataset.read < 8 * (self.step + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.__dict__.setdefault("counts", []).append(self.train_dataset.read)
        super().train_step(microbatches)

    def _say(self, *texts: str) -> None:
        self.__dict__.setdefault("said", []).extend(texts)

    def report(self) -> Any:
        return self.__dict__["counts"], self.__dict__["said"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_whole_next_step_is_read_while_one_computes(ranks: Pools, tmp_path: Path, workers: int) -> None:
    """Four micro-batches a step; a stream is read by a thread, whatever --num_workers says."""
    flags = ("--batch_size", 2, "--max_steps", 3, "--prefetch", 1, "--num_workers", workers)
    run = ranks(1).run(train, ReadAhead, tmp_path, *flags)[0]
    counts, said = run.extra
    assert counts == [16, 24, 32]
    line = "--num_workers 2: Watched has no numbered samples to divide among processes, so a thread reads it"
    assert any(text.startswith(line) for text in said) == (workers == 2)


class OnlyAStream(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Rows()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            (),
            "ConfigError: the training data has no length; set the length of the run: --max_steps or --max_train_tokens",
        ),
        (
            ("--max_steps", 2, "--do_val"),
            "ConfigError: --do_val and --split_rate 0.99 need validation data, but Rows ",
        ),
    ],
)
def test_a_stream_needs_its_limits(ranks: Pools, tmp_path: Path, flags: tuple[object, ...], text: str) -> None:
    for error in ranks(2).run(user_error, OnlyAStream, tmp_path, *flags):
        assert error.startswith(text)


# Data-loader functions.


class OfFunctions(Recording):
    """``--batch_size`` rows a rank; without a train_dataset the loader tells how long an epoch is."""

    def _init_dataset(self, config: Config) -> None:
        pattern = f"{config.data.dataset_path}/train_*.bin"
        self.train_loader = FunctionLoader(data_loader, pattern, config.train.batch_size, config.train.seq_len)


@pytest.mark.parametrize("world", [1, 2])
def test_a_data_loader_function_feeds_the_trainer(ranks: Pools, tmp_path: Path, world: int) -> None:
    data = shards(tmp_path / "data")
    runs = ranks(world).run(train, OfFunctions, tmp_path / "log", *read(data))
    assert runs[0].step == 4  # 32 samples of 33: the last is no whole batch
    tokens = np.fromfile(data / "train_000000.bin", np.uint16)[512:]
    found = sorted(row for run in runs for step in run.extra for row in step)
    assert found == sorted(tuple(tokens[first : first + 6].tolist()) for first in range(0, 12 * 32, 12))


# Weights.


class Weighted(Trainer):
    """Samples of 12 tokens with weights; ``scale`` times the same ones give the same gradients."""

    scale, as_labels = 1.0, False

    def _init_dataset(self, config: Config) -> None:
        random = np.random.default_rng(3)
        tokens = torch.from_numpy(random.integers(0, 61, (32, 13)))
        weights = torch.from_numpy(random.integers(0, 3, (32, 12))).float()
        if self.as_labels:
            weights = (weights > 0).float()
        labels = tokens[:, 1:]
        if self.as_labels == "ignored":
            labels, weights = torch.where(weights > 0, labels, -100), torch.ones_like(weights)
        samples = zip(tokens[:, :-1], labels, self.scale * weights, strict=True)
        items = [{"input_ids": i, "labels": n, "weights": w} for i, n, w in samples]
        self.train_dataset, self.val_dataset = _Items(items), _Items(items[:7])


class _Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Scaled(Weighted):
    scale = 8.0


class ZeroOrOne(Weighted):
    as_labels = True


class Ignored(Weighted):
    as_labels = "ignored"  # type: ignore[assignment]


class NegativeWeights(Weighted):
    scale = -1.0


@pytest.mark.parametrize("world", [1, 4])
def test_weights_reach_the_loss(ranks: Pools, tmp_path: Path, world: int) -> None:
    def log(cls: type[Trainer], world: int = world, *flags: object) -> dict[int, float]:
        log = ranks(world).run(train, cls, tmp_path / f"{cls.__name__}{world}", "--do_val", *flags)[0].log
        return {**losses(log), -1: losses(log, "val")[4]}

    weighted = log(Weighted)
    assert weighted == pytest.approx(log(Weighted, 1), rel=1e-5)  # also of ranks whose weights sum up differently
    assert weighted == pytest.approx(log(Scaled), rel=1e-6)
    assert log(ZeroOrOne) == pytest.approx(log(Ignored), rel=1e-6)
    assert weighted != pytest.approx(log(ZeroOrOne), rel=1e-3)


def test_a_weighted_loss_is_the_weighted_mean(ranks: Pools, tmp_path: Path) -> None:
    """Of the first step, from the token losses of the untrained model."""
    record, expected = ranks(1).run(_first_step, tmp_path)[0]
    assert record == pytest.approx(expected, rel=1e-6)


def _first_step(log_dir: Path) -> tuple[float, float]:
    from tests.helpers.runs import TINY, config_of

    trainer = Weighted(config_of(*TINY, "--log_dir", log_dir, "--max_steps", 1, "--debug"))
    sampler = trainer.train_sampler
    assert sampler is not None
    batch = trainer.train_dataset
    samples = [batch[n] for n in sampler.samples_of_step(0)]  # type: ignore[index]
    with torch.no_grad():
        logits = trainer.raw_model(torch.stack([s["input_ids"] for s in samples])).double()
    token = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.cat([s["labels"] for s in samples]), reduction="none"
    )
    weights = torch.cat([s["weights"] for s in samples]).double()
    trainer.train()
    return trainer.one_step_results["loss"], float((token * weights).sum() / weights.sum())


def test_weights_that_make_no_sense_are_refused(ranks: Pools, tmp_path: Path) -> None:
    for error in ranks(1).run(user_error, NegativeWeights, tmp_path):
        assert error == "DataError: the dataset gave a weight of -2.0; weights must be finite and at least 0"
