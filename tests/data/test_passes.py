"""Loaders of the user's own that shuffle: another order in every pass, the same one in a resumed run and on ranks that
share sequences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses, train
from tinytron.data import Batch
from tinytron.data.passes import endless, one_pass
from tinytron.errors import DataError
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer

Pools = Callable[[int], Ranks]
SAMPLES = 24


class Numbers(Dataset[Any]):
    """Sample i begins with token i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 61, (13,), generator=torch.Generator().manual_seed(index))
        tokens[0] = index
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(), batch_size=2, shuffle=True, **options)


def distributed(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(), batch_size=2, sampler=DistributedSampler(Numbers(), 1, 0), **options)


def firsts(items: Any, count: int | None = None) -> list[int]:
    """The sample numbers of ``count`` batches."""
    return [int(row[0]) for item in islice(items, count) for row in item["input_ids"]]


@pytest.mark.parametrize("make", [shuffled, distributed])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_pass_has_an_order_of_its_own(make: Any, num_workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = make(num_workers=num_workers)
    order = firsts(endless(loader, 1, 0), SAMPLES)
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws from it
    first, second = order[:SAMPLES], order[SAMPLES:]
    assert sorted(first) == sorted(second) == list(range(SAMPLES))
    assert first != second
    torch.manual_seed(6)  # a resumed run has another state
    for skip in (1, 11, 12, 19):
        assert firsts(endless(make(num_workers=num_workers), 1, 0, skip), SAMPLES - skip) == order[2 * skip :]


def test_what_an_order_follows_from() -> None:
    orders = [firsts(one_pass(shuffled(), *key)) for key in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 4


def test_an_epoch_is_told_to_all_who_ask() -> None:
    class Told(list[int]):
        def __init__(self, *items: int) -> None:
            super().__init__(items)
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    loader = Told(1, 2)
    loader.dataset, loader.sampler, loader.batch_sampler = loader, Told(), Told()  # type: ignore[attr-defined]
    loader.batch_sampler.sampler = Told()  # type: ignore[attr-defined]
    assert list(islice(endless(loader, 0, 0), 5)) == [1, 2, 1, 2, 1]
    told = [loader, loader.sampler, loader.batch_sampler, loader.batch_sampler.sampler]  # type: ignore[attr-defined]
    assert [part.epochs for part in told] == [[0, 1, 2]] * 4
    with pytest.raises(DataError, match="train_loader gave no batch"):
        next(endless([], 0, 0))


class Recording(Trainer):
    """Remembers which samples it trained on."""

    make: Any = staticmethod(shuffled)

    def _init_dataset(self, config: Config) -> None:
        self.seen: list[int] = []
        self.train_loader = self.make()

    def _loss(self, batch: Batch) -> LossSums:
        self.seen += batch.input_ids[:, 0].tolist()
        return super()._loss(batch)

    def report(self) -> list[int]:
        return self.seen


class OfDistributedSampler(Recording):
    make = staticmethod(distributed)


FLAGS = ("--lr_schedule", "constant", "--save_every_steps", 4, "--max_steps")


@pytest.mark.parametrize("cls", [Recording, OfDistributedSampler])
def test_a_resumed_run_reads_what_is_left(ranks: Pools, tmp_path: Path, cls: type[Recording]) -> None:
    (whole,) = ranks(1).run(train, cls, tmp_path / "whole", *FLAGS, 9)
    (part,) = ranks(1).run(train, cls, tmp_path / "parts", *FLAGS, 4)
    (rest,) = ranks(1).run(train, cls, tmp_path / "parts", *FLAGS, 9)
    assert part.extra + rest.extra == whole.extra
    assert sorted(whole.extra[:SAMPLES]) == list(range(SAMPLES))
    assert rest.log == whole.log


def test_ranks_that_share_sequences_read_the_same(ranks: Pools, tmp_path: Path) -> None:
    (one,) = ranks(1).run(train, Recording, tmp_path / "one", *FLAGS, 4)
    both = ranks(2).run(train, Recording, tmp_path / "two", *FLAGS, 4, "--sep_size", 2)
    assert losses(both[0].log) == pytest.approx(losses(one.log), rel=1e-5)
