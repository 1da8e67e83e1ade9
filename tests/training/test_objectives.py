"""Objectives of one's own: extra keys of the data on every layout, another divisor, auxiliary values in validation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses, train, user_error
from tinytron.data import Batch
from tinytron.data.batch import as_batch, collate
from tinytron.errors import DataError
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
SHORT = ("--max_steps", 2, "--debug")
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]


class Marked(Dataset[Any]):
    """Sample i: random ids, and with every token its place, with every sample its number and a vector."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(61, (13,), generator=torch.Generator().manual_seed(index))
        places = 100 * index + torch.arange(12)
        labels = ids[1:].clone()
        labels[: index % 5] = IGNORE_INDEX
        return {
            "input_ids": ids[:-1], "labels": labels, "number": index, "vector": [float(index), 0.5, -1.0], "places": places,
            "pairs": torch.stack([places, -places], dim=1), "note": None,
        }  # fmt: skip


class Mean(Trainer):
    """Returns what other trainers would."""

    def _loss(self, batch: Batch) -> Any:
        return super()._loss(batch).objective / batch.targets()


class PerToken(Trainer):
    """Sums up nothing."""

    def _loss(self, batch: Batch) -> LossSums:
        losses = super()._loss(batch)
        assert losses.per_token is not None
        return losses._replace(token=losses.per_token)


def test_a_loss_that_is_no_sum_is_one_error(ranks: Pools, tmp_path: Path) -> None:
    for error in ranks(2).run(user_error, Mean, tmp_path, *SHORT):
        assert re.match(
            says("ConfigError: _loss returned a Tensor; ... LossSums(objective=loss_sum, ... own_loss.py"),
            error,
        )
    (error,) = ranks(1).run(user_error, PerToken, tmp_path, *SHORT)
    told = says(
        "ConfigError: _loss returned a tensor of shape [2, 12] as LossSums.token, ... scalar ... use its .sum()"
    )
    assert re.match(told, error)


class Extras(Trainer):
    """Keeps what its loss is given."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Marked()

    def _loss(self, batch: Batch) -> LossSums:
        kept = {name: tensor.tolist() for name, tensor in batch.extras.items()}
        self.seen = [*getattr(self, "seen", []), kept]
        assert batch.extras["places"].shape == batch.input_ids.shape
        return super()._loss(batch)

    def report(self) -> Any:
        return self.seen, self.sp_rank, self.sp_world_size


@pytest.mark.parametrize(("world", "sep"), LAYOUTS)
@pytest.mark.parametrize("workers", [0, 1])
def test_extra_keys_reach_the_loss_on_every_layout(
    ranks: Pools, tmp_path: Path, world: int, sep: int, workers: int
) -> None:
    if workers and world > 1:
        pytest.skip("one layout is enough for loaders' processes")
    flags = (*SHORT, "--sep_size", sep, "--num_workers", workers)
    for result in ranks(world).run(train, Extras, tmp_path, *flags):
        seen, part, parts = result.extra
        s = 12 // parts
        for kept in seen:
            assert kept.keys() == {"number", "vector", "places", "pairs"}
            for number, vector, places, pairs in zip(
                *(kept[k] for k in ("number", "vector", "places", "pairs")), strict=True
            ):
                assert vector == [float(number), 0.5, -1.0]  # whole on every rank
                assert places == [100 * number + part * s + i for i in range(s)]  # cut with the sequence
                assert pairs == [[place, -place] for place in places]


def sample(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(4), "labels": torch.zeros(4), **more}


@pytest.mark.parametrize(
    ("items", "text"),
    [
        (
            [sample(note="a text")],
            "... key note ... (str) ... give numbers, or leave it out",
        ),
        ([sample(words=["a", "b"])], "... key words ... (list) ..."),
        ([sample(documents=1)], "... key documents ... rename it"),
        (
            [sample(x=[1]), sample(x=[1, 2])],
            "... have x ... [[1], [2]] ... pad them ...",
        ),
        ([sample(x=1), sample(y=1)], "... different keys: ..."),
    ],
)
def test_what_cannot_travel_is_refused_by_name(items: list[Any], text: str) -> None:
    with pytest.raises(DataError, match=says(text)):
        collate(items)


def test_a_loader_gives_extras_for_every_sequence() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    batch = as_batch({"input_ids": ids, "labels": ids, "reward": torch.ones(2), "none": None})
    assert set(batch.extras) == {"reward"}
    for wrong in (torch.ones(3), torch.tensor(1.0)):
        with pytest.raises(DataError, match=r"reward of shape \[3?\] with 2 sequences; .*one row for each"):
            as_batch({"input_ids": ids, "labels": ids, "reward": wrong})


def test_extras_survive_a_loaders_process() -> None:
    loaded = list(DataLoader(Marked(), batch_size=16, collate_fn=collate, num_workers=1))
    assert loaded[1].extras["number"].tolist() == list(range(16, 32))
    assert not collate([sample()]).extras


# Divisors.


class PerSequence(Extras):
    """The mean over sequences, not over targets, with a value of its own."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset, self.val_dataset = Marked(), Marked()

    def _loss(self, batch: Batch) -> LossSums:
        sums = super()._loss(batch)
        return sums._replace(aux={"targets_per_sequence": batch.targets().double()})

    def _normalizer(self, batch: Batch) -> torch.Tensor:
        here = (batch.labels != IGNORE_INDEX).any(1)
        return here.sum() * (self.sp_rank == 0)


@pytest.mark.parametrize("precision", ["fp32"])
def test_an_objective_says_what_it_is_divided_by(ranks: Pools, tmp_path: Path, precision: str) -> None:
    flags = ("--max_steps", 3, "--do_val", "--val_every_steps", 1, "--precision", precision, "--batch_size", 2)
    flags = (*flags, "--grad_clip_value", 0)
    runs = [ranks(w).run(train, PerSequence, tmp_path / f"{w}{s}", *flags, "--sep_size", s)[0] for w, s in LAYOUTS]
    plain = ranks(1).run(train, Extras, tmp_path / "plain", *SHORT)[0]
    first = {r["stage"]: r for r in runs[0].records if r["step"] == 1}
    # 32 samples, of which sample i has 12 - i % 5 targets
    targets = sum(12 - i % 5 for i in range(32)) / 32
    assert first["val"]["targets_per_sequence"] == pytest.approx(targets)
    assert losses(runs[0].log)[1] == pytest.approx(
        losses(plain.log)[1] * first["train"]["targets_per_sequence"], rel=1e-6
    )
    for run in runs[1:]:
        for name in ("train", "val"):
            assert losses(run.log, name) == pytest.approx(losses(runs[0].log, name), rel=1e-5)
        norms = [[r["grad_norm"] for r in x.records if r["stage"] == "train"] for x in (run, runs[0])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_validation_logs_the_balance_of_experts(ranks: Pools, tmp_path: Path) -> None:
    moe = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)
    flags = (*moe, "--do_val", "--max_steps", 1, "--no-do_save")
    # Three samples: whole batches of one, or batches of two with one or more rows of filling, which must not count.
    runs = [(1, "--batch_size", 1), (1, "--batch_size", 2), (2, "--batch_size", 2), (2, "--batch_size", 4)]
    exact, *filled = (
        ranks(world).run(train, Trainer, tmp_path / str(number), *flags, *size)[0].records[-1]
        for number, (world, *size) in enumerate(runs)
    )
    assert exact["stage"] == "val"
    for record in filled:
        assert record["loss"] == pytest.approx(exact["loss"], rel=1e-5)
        for name in ("moe_balance", "moe_z"):
            assert record[name] == pytest.approx(exact[name], rel=1e-5)


class Texts(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = type("Noted", (Marked,), {"__getitem__": lambda s, i: Marked()[i] | {"note": "text"}})()


def test_a_key_that_cannot_travel_ends_the_run_with_its_name(ranks: Pools, tmp_path: Path) -> None:
    for text in ranks(2).run(user_error, Texts, tmp_path, *SHORT):
        assert text.startswith("DataError: the data has a key note whose value (str) is not a tensor")
