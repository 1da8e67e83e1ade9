"""``--spike_action rollback``: after a spike the run goes back to its last checkpoint and reads other data. It must then be
the run that never saw the data in between, whatever the layout, the data and the interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses, read_logs, train, untimed, user_error
from tests.helpers.stopping import StoppingTrainer, run_until, whole
from tests.training.test_trainer_mixture import mixture
from tinytron.data import Batch
from tinytron.data.order import ShuffledEpochs
from tinytron.errors import ConfigError
from tinytron.metrics.spikes import Spike
from tinytron.model.modules.loss import LossSums
from tinytron.observe.events import Message, events_of_messages
from tinytron.training import Config, Trainer

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])
BASE: tuple[object, ...] = (
    *("--max_steps", 14, "--save_every_steps", 4, "--log_every", 5, "--mock_data_num_samples", 200, "--dropout", 0.1),
    *("--spike_sigma", 20, "--spike_window", 6, "--lr_schedule", "constant", "--do_val", "--val_every_steps", 6),
)
BACK = (*BASE, "--spike_action", "rollback")


class BadData(StoppingTrainer):
    """The data of the ninth step spike, on the last rank. All other losses are what they are."""

    bad = 8

    def _loss(self, batch: Batch) -> LossSums:
        losses = super()._loss(batch)
        sizes = self.training_info.batch_sizes
        here = self.data.skips.position(self.step, sizes) == sizes.before(self.bad)
        leaps = here and self.state.rank == self.state.layout.world_size - 1 and torch.is_grad_enabled()
        return losses._replace(token=losses.token * 50) if leaps else losses


class Shorter:
    """An order without the positions from ``first`` to ``stop``: what is left, counted by hand."""

    def __init__(self, order: Any, first: int, stop: int) -> None:
        self.order, self.first, self.stop = order, first, stop
        self.num_samples = order.num_samples

    def __call__(self, positions: Any) -> Any:
        return self.order(positions + (positions >= self.first) * (self.stop - self.first))


class Without(StoppingTrainer):
    """Never sees the samples of steps 9 and 10: the spike, and what followed it before the report."""

    gap = (8, 10)

    def _init_pipeline(self, config: Config) -> None:
        super()._init_pipeline(config)
        assert self.train_sampler is not None, "mock data have numbers"
        before = self.training_info.batch_sizes.before
        self.train_sampler.order = Shorter(self.train_sampler.order, *map(before, self.gap))


def same_run(mine: list[Run], theirs: list[Run]) -> None:
    """The logs, the weights, the states and the spikes' windows are equal, bit by bit."""
    assert untimed(mine[0].records) == untimed(theirs[0].records)
    assert mine[0].log == theirs[0].log
    ours, others = whole(mine), whole(theirs)
    assert ours.keys() == others.keys()
    assert all((ours[key] == others[key]).all() for key in ours)
    for file in sorted(theirs[0].folder.glob("*_meta.pt")):
        found = [torch.load(run.folder / file.name, weights_only=True) for run in (mine[0], theirs[0])]
        for name in ("guard", "counters", "val_loss"):
            assert found[0][name] == found[1][name]


EXPERTS = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)
LAYOUTS = [
    (1, ()),
    (2, ()),
    (2, ("--no-use_distributed_optimizer", "--ema_decay", 0.9)),
    (2, ("--sep_size", 2, "--optimizer", "muon")),
    (2, ("--ep_size", 2, *EXPERTS, "--moe_bias_update_rate", 0.01)),
    (4, ("--sep_size", 2, "--no-async_save")),
]


@pytest.mark.parametrize(("world", "flags"), LAYOUTS)
@pytest.mark.sample(2)
def test_it_is_the_run_without_that_data(ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...]) -> None:
    found = ranks(world).run(_run, BadData, tmp_path / "a", 0, *BACK, *flags)
    assert len(list(found[0].folder.glob("*_meta.pt"))) == 5
    twin = ranks(world).run(_run, Without, tmp_path / "b", 0, *BASE, *flags)
    same_run(found, twin)
    meta = torch.load(found[0].folder / "00014_meta.pt", weights_only=True)
    assert meta["skips"] == [[8, 16]]
    assert meta["data_position"] == {"step": 14, "samples": 14 * 8 + 16, "tokens": 14 * 96}
    lines = (found[0].folder / "messages.jsonl").read_text().splitlines()
    (message,) = [Message(**json.loads(line)) for line in lines if "passing over" in line]
    assert message.text.startswith(
        "step 10 | back to the checkpoint of step 8, passing over 16 sequences: step 9: loss "
    )
    ((step, kind, text),) = events_of_messages([message])
    assert (step, kind) == (8, "went back")
    assert text.startswith("after step 10 the run went back to the checkpoint of step 8, passing over 16 sequences: ")


def _run(cls: type[StoppingTrainer], folder: Path, stop_after: int, *flags: object) -> Run:
    return run_until(folder, stop_after, *flags, cls=cls)


@pytest.mark.parametrize("stops", [(9,), (10,), (11,), (13,), (9, 11, 13)])
@pytest.mark.sample(2)
def test_an_interrupted_run_agrees(ranks: Pools, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Before the spike is known, after going back but before the next checkpoint, and after it."""
    unbroken = ranks(2).run(_run, BadData, tmp_path / "a", 0, *BACK)
    for stop in (*stops, 0):
        broken = ranks(2).run(_run, BadData, tmp_path / "b", stop, *BACK)
    same_run(broken, unbroken)


def test_it_goes_back_to_the_start_and_again_from_there(ranks: Pools, tmp_path: Path) -> None:
    """Nothing was saved before the spike but the first weights."""
    flags = (*BACK, "--save_every_steps", 0)
    found = ranks(1).run(_run, BadData, tmp_path / "a", 0, *flags)
    twin = ranks(1).run(_run, WithoutStart, tmp_path / "b", 0, *BASE, "--save_every_steps", 0)
    same_run(found, twin)
    assert (found[0].folder / "00000_meta.pt").exists()


class BadTwice(BadData):
    """A second time, the data of step 13 spike."""

    def _loss(self, batch: Batch) -> LossSums:
        self.bad = 14 if self.step >= 12 else 8
        return super()._loss(batch)


def test_it_goes_back_again_later(ranks: Pools, tmp_path: Path) -> None:
    """And then knows all that it passed over, also after an interruption."""
    for stop in (0, 13):
        folder = tmp_path / str(stop)
        for until in (stop, 0)[not stop :]:
            (found,) = ranks(1).run(_run, BadTwice, folder, until, *BACK, "--max_steps", 20)
        meta = torch.load(found.folder / "00020_meta.pt", weights_only=True)
        assert meta["skips"] == [[8, 16], [12, 24]]
        assert list(losses(found.log)) == list(range(1, 21))


class WithoutStart(Without):
    gap = (0, 10)


class Rows(BadData):
    """Remembers the first tokens of every row of the steps that count."""

    def train_step(self, microbatches: list[Batch]) -> None:
        rows: list[Any] = self.__dict__.setdefault("rows", [])
        del rows[self.step :]
        rows.append([tuple(row[:6].tolist()) for batch in microbatches for row in batch.input_ids])
        super().train_step(microbatches)

    def report(self) -> Any:
        return self.rows


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        made = torch.Generator().manual_seed(3)
        for _ in range(500):
            yield torch.randint(61, (13,), generator=made)


class Streaming(Rows):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Stream()


class OwnLoader(Rows):
    def _init_dataset(self, config: Config) -> None:
        rows = list(Stream())
        pairs = [torch.stack(rows[n : n + 2]) for n in range(0, 500, 2)]
        loader: Iterable[Any] = [(pair[:, :-1], pair[:, 1:]) for pair in pairs]
        self.train_loader = loader


KINDS = [
    (Rows, ()),
    (Rows, ("--num_workers", 2)),
    (Rows, ("--prefetch", 0)),
    (Rows, ("--batch_warmup_sizes", 48, 72, "--batch_warmup_ends", 3, 11)),
    (Streaming, ()),
    (Streaming, ("--batch_warmup_sizes", 48, "--batch_warmup_ends", 9)),
    (OwnLoader, ()),
    (OwnLoader, ("--batch_warmup_sizes", 48, "--batch_warmup_ends", 9)),
]


@pytest.mark.parametrize(("cls", "flags"), KINDS)
@pytest.mark.sample(4)
def test_every_kind_of_data_goes_on_after_the_spike(
    ranks: Pools, tmp_path: Path, cls: type[Rows], flags: tuple[object, ...]
) -> None:
    flags = (*flags, "--no-do_val")
    (plain,) = ranks(1).run(train, cls, tmp_path / "a", *BASE, *flags, "--max_steps", 18)
    (found,) = ranks(1).run(train, cls, tmp_path / "b", *BACK, *flags)
    whole_order = [row for step in plain.extra for row in step]
    sizes = [len(step) for step in found.extra]
    assert sizes == [len(step) for step in plain.extra[:14]]
    kept = whole_order[: sum(sizes[:8])] + whole_order[sum(len(step) for step in plain.extra[:10]) :]
    assert [row for step in found.extra for row in step] == kept[: sum(sizes)]


class AlwaysBad(BadData):
    """All data from the ninth step on spike."""

    def _loss(self, batch: Batch) -> LossSums:
        losses = Trainer._loss(self, batch)
        sizes = self.training_info.batch_sizes
        leaps = self.data.skips.position(self.step, sizes) >= sizes.before(self.bad) and torch.is_grad_enabled()
        return losses._replace(token=losses.token * 50) if leaps else losses


def test_it_ends_if_all_data_spike(ranks: Pools, tmp_path: Path) -> None:
    (said,) = ranks(1).run(user_error, AlwaysBad, tmp_path, *BACK)
    assert said.startswith("TrainingError: step 9: loss ")
    assert (
        "the run has gone back to step 8 3 times before, and each time it spiked on other data; raise --spike_sigma"
        in said
    )
    folder = next(tmp_path.glob("tiny_*"))
    assert list(losses(read_logs(folder)[0])) == list(range(1, 9))
    messages = [json.loads(line)["text"] for line in (folder / "messages.jsonl").read_text().splitlines()]
    assert messages[-1] == said.replace("TrainingError", "error", 1)
    assert sum("passing over" in text for text in messages) == 4


def test_router_traces_are_cut_as_well(ranks: Pools, tmp_path: Path) -> None:
    flags = (*EXPERTS, "--moe_route_trace", "--log_every", 1)
    found = ranks(1).run(train, BadData, tmp_path / "a", *BACK, *flags)[0].folder / "routes_rank0.jsonl"
    twin = ranks(1).run(train, OneLess, tmp_path / "b", *BASE, *flags)[0].folder / "routes_rank0.jsonl"
    assert found.read_text() == twin.read_text()


def _returns(log_dir: Path) -> list[bool]:
    guard = Trainer(config_of(*TINY, *BACK, "--log_dir", log_dir)).guards
    ends = []
    for to in (4, 4, 4, 8, 8, 8, 8):
        guard.spike = Spike(9, "loss", 50.0, 5.0)
        guard.went_back(to)
        ends.append(guard.ends)
    return ends


def test_only_returns_to_one_checkpoint_add_up(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(1).run(_returns, tmp_path) == [[False] * 6 + [True]]


class OneLess(Without):
    gap = (8, 9)


MIXED = ("--no-use_mock_data", "--log_every", 1, "--dataset_path")


def test_what_is_passed_over_is_not_seen(ranks: Pools, tmp_path: Path) -> None:
    """The log does not count it, and a resumed run finds that it has the same data."""
    for stop in (13, 0):
        (found,) = ranks(1).run(_run, BadData, tmp_path / "log", stop, *BACK, *MIXED, mixture(tmp_path))
    steps = [record["sources"] for record in found.records if record["stage"] == "train"]
    assert len(steps) == 14
    for name, part in steps[-1].items():
        assert part["tokens_seen"] == sum(step.get(name, {"targets": 0})["targets"] for step in steps)


def test_data_that_would_end_too_early_are_named(ranks: Pools, tmp_path: Path) -> None:
    """Enough for the run, but not without those that are passed over: a step, because every step is reported."""
    path = mixture(tmp_path, (("web", 1, {"max_tokens": 14 * 96 + 48}),))
    (said,) = ranks(1).run(user_error, BadData, tmp_path / "log", *BACK, *MIXED, path)
    assert said.startswith("DataError: ")
    assert f"the mixture ends after {14 * 96 + 48} tokens" in said
    log, _ = read_logs(next((tmp_path / "log").glob("tiny_*")))
    assert list(losses(log)) == list(range(1, 10))  # at once, and not when they do


def test_a_checkpoint_from_elsewhere_is_first_saved_here(ranks: Pools, tmp_path: Path) -> None:
    flags = (*BACK, "--max_steps", 4)
    (before,) = ranks(1).run(train, Trainer, tmp_path / "a", *flags)
    flags = (*BACK, "--save_every_steps", 0, "--resume_path", before.folder)
    (found,) = ranks(1).run(_run, BadData, tmp_path / "b", 0, *flags)
    assert sorted(path.name for path in found.folder.glob("*_meta.pt")) == ["00004_meta.pt", "00014_meta.pt"]
    assert list(losses(found.log)) == list(range(5, 15))
    meta = torch.load(found.folder / "00014_meta.pt", weights_only=True)
    assert meta["skips"] == [[4, 6 * 8]]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--spike_action", "rollback"), "--spike_action rollback ... use --spike_sigma 6"),
        (("--spike_action", "stop"), "--spike_action stop ... use --spike_sigma 6"),
        (
            ("--spike_action", "rollback", "--spike_sigma", 6, "--debug"),
            "--spike_action rollback needs checkpoints ... drop --debug ... skip",
        ),
        (
            ("--spike_action", "rollback", "--spike_sigma", 6, "--no-do_save"),
            "--spike_action rollback needs checkpoints ... drop --no-do_save ... skip",
        ),
    ],
)
def test_what_it_needs(flags: tuple[object, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=says(text)):
        config_of(*TINY, *flags)


def test_the_order_of_the_twin() -> None:
    order = ShuffledEpochs(20, 1)
    listed = order(np.arange(20)).tolist()
    assert Shorter(order, 4, 7)(np.arange(10)).tolist() == listed[:4] + listed[7:13]
