"""What users override: data sets and loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses, train, user_error
from tinytron.data import Batch, MockDataset
from tinytron.training import Config, Trainer

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


# Data sets.


class Dicts(Dataset[Any]):
    """Items as dictionaries; ``kind`` picks other forms of the same data."""

    def __init__(self, count: int = 32, kind: str = "dict") -> None:
        self.tokens = np.random.default_rng(7).integers(0, 61, (count, 13))
        self.kind = kind

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Any:
        row = self.tokens[index]
        forms = {
            "dict": {"input_ids": torch.tensor(row[:-1]), "labels": torch.tensor(row[1:])},
            "dict of lists, with more": {"input_ids": row[:-1].tolist(), "labels": row[1:].tolist(), "index": index},
            "tensor row": torch.tensor(row, dtype=torch.int32),
            "array row": row,
            "list row": row.tolist(),
        }
        return forms[self.kind]


class OnlyTrainDataset(Trainer):
    kind = "dict"

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Dicts(kind=self.kind)

    def report(self) -> dict[str, int]:
        val = self.val_dataset
        return {"train": len(self.train_dataset), "val": 0 if val is None else len(val)}  # type: ignore[arg-type]


class TensorRows(OnlyTrainDataset):
    kind = "tensor row"


class ArrayRows(OnlyTrainDataset):
    kind = "array row"


class ListRows(OnlyTrainDataset):
    kind = "list row"


class ListDicts(OnlyTrainDataset):
    kind = "dict of lists, with more"


@WORLDS
def test_a_train_dataset_alone_is_enough(ranks: Pools, tmp_path: Path, world: int) -> None:
    result = ranks(world).run(train, OnlyTrainDataset, tmp_path)[0]
    assert result.extra == {"train": 32, "val": 0}
    reference = ranks(1).run(train, OnlyTrainDataset, tmp_path / "one")[0]
    assert losses(result.log) == pytest.approx(losses(reference.log), rel=1e-5)


@pytest.mark.parametrize("cls", [TensorRows, ArrayRows, ListRows, ListDicts])
def test_items_may_be_rows_of_one_more_token(ranks: Pools, tmp_path: Path, cls: type[OnlyTrainDataset]) -> None:
    reference = ranks(1).run(train, OnlyTrainDataset, tmp_path / "dict")[0]
    assert ranks(1).run(train, cls, tmp_path / "row")[0].log == reference.log


@WORLDS
@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (("--do_val",), (32, 0)),
        (("--do_val", "--split_rate", 0.75), (24, 8)),
        (("--split_rate", 0.75), (24, 8)),
        (("--split_rate", 1.0), (32, 0)),
    ],
    ids=["default_rate", "three_quarters", "split_without_val", "everything"],
)
def test_validation_data_is_split_off(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...], sizes: tuple[int, int]
) -> None:
    if flags == ("--do_val",):  # 0.99 of 32 samples leaves none
        errors = ranks(world).run(user_error, OnlyTrainDataset, tmp_path, *flags)
        assert errors[0].startswith("ConfigError: --split_rate 0.99 of 32 samples leaves none")
        return
    result = ranks(world).run(train, OnlyTrainDataset, tmp_path, "--max_steps", 2, *flags)[0]
    assert result.extra == {"train": sizes[0], "val": sizes[1]}
    if "--do_val" not in flags:
        assert losses(result.log, "val") == {}
        return
    assert result.records[-1]["tokens"] == 8 * 12
    single = ranks(1).run(train, OnlyTrainDataset, tmp_path / "one", "--max_steps", 2, *flags)[0]
    assert losses(result.log, "val") == pytest.approx(losses(single.log, "val"), rel=1e-5)


class _Broken(Dataset[Any]):
    def __init__(self, item: Any, count: int) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.item[index % len(self.item)]


class _BrokenData(Trainer):
    items: Any = (torch.arange(13),)
    count = 32

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = _Broken(self.items, self.count)


class Empty(_BrokenData):
    count = 0


class WrongKeys(_BrokenData):
    items = ({"input_ids": torch.arange(12), "targets": torch.arange(12)},)


class DifferentLengths(_BrokenData):
    items = (torch.arange(13), torch.arange(12))


class TwoDimensions(_BrokenData):
    items = (torch.zeros(2, 13),)


class LargeTokens(_BrokenData):
    items = (torch.arange(50, 63),)


class NegativeTokens(_BrokenData):
    items = ({"input_ids": torch.full((12,), -100), "labels": torch.arange(12)},)


class LargeTokensInValidation(_BrokenData):
    def _init_dataset(self, config: Config) -> None:
        super()._init_dataset(config)
        self.val_dataset = _Broken(LargeTokens.items, 4)


class _OverwrittenMock(MockDataset):
    """Writes its labels into the tokens that they share with the ids."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        sample["labels"][:-1] = -100
        return sample


class SubclassOfOurs(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = _OverwrittenMock(32, 12, 61, seed=0)


class TooLong(_BrokenData):
    items = (torch.arange(40),)


class NoLength(_BrokenData):
    def _init_dataset(self, config: Config) -> None:
        class Sequence:
            def __getitem__(self, index: int) -> Any:
                return torch.arange(13)

        self.train_dataset = Sequence()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Empty, "DataError: _Broken is empty ..."),
        (WrongKeys, "DataError: ... ['input_ids', 'targets'] ... lacks ['labels']"),
        (DifferentLengths, "DataError: the ..."),
        (
            TwoDimensions,
            "DataError: a dataset item ... seq_len + 1 ... shape [2, 13]",
        ),
        (LargeTokens, "DataError: ... token id 62 ... 0..60 ... --vocab_size ..."),
        (NegativeTokens, "DataError: ... token id -100 ... 0..60 ..."),
        (LargeTokensInValidation, "DataError: ... token id 62 ... 0..60 ..."),
        (SubclassOfOurs, "DataError: ... token id -100 ... 0..60 ..."),
        (TooLong, "DataError: ... 39 tokens ... --seq_len is 12 ..."),
        (NoLength, "DataError: Sequence ... __len__ ... torch.utils.data.IterableDataset"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_error(
    ranks: Pools, tmp_path: Path, cls: type[Trainer], message: str
) -> None:
    flags = ("--do_val",) if cls is LargeTokensInValidation else ()
    for error in ranks(2).run(user_error, cls, tmp_path, *flags):
        assert re.search(says(message), error), error
        assert "\n" not in error


# Loaders.


def _batches(trainer: Trainer, form: str) -> list[Any]:
    """Micro-batch m of rank r holds samples 2 * (m * world + r) and the next: 4 steps of 8 samples."""
    data, world, rank = Dicts(), trainer.dp_world_size, trainer.dp_rank
    tokens = torch.from_numpy(data.tokens).view(-1, 2, 13)[rank::world]
    pairs = [[rows[:, :-1], rows[:, 1:]] for rows in tokens]
    forms: dict[str, Callable[[list[Any]], Any]] = {
        "batch": lambda pair: Batch(*pair),
        "dict": lambda pair: dict(zip(("input_ids", "labels"), pair, strict=True)),
        "pair": lambda pair: pair,
    }
    return [forms[form](pair) for pair in pairs]


class OwnLoader(Trainer):
    form = "batch"

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Dicts()
        batches = _batches(self, self.form)
        self.train_loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        self.val_loader = DataLoader(batches[:2], batch_size=None)  # type: ignore[arg-type]


class OwnLoaderOfDicts(OwnLoader):
    form = "dict"


class OwnLoaderOfPairs(OwnLoader):
    form = "pair"


class OwnLoaderWithoutBatches(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Dicts()
        self.train_loader = DataLoader([], batch_size=None)  # type: ignore[arg-type]


class OwnLoaderOnly(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_loader = DataLoader(_batches(self, "batch"), batch_size=None)  # type: ignore[arg-type]


class NoData(Trainer):
    def _init_dataset(self, config: Config) -> None:
        pass


class OwnLoaderOfTexts(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Dicts()
        self.train_loader = DataLoader([{"text": "hello"}], batch_size=None)  # type: ignore[arg-type]


@WORLDS
@pytest.mark.parametrize("cls", [OwnLoader, OwnLoaderOfDicts, OwnLoaderOfPairs])
def test_an_own_loader_is_used(ranks: Pools, tmp_path: Path, world: int, cls: type[OwnLoader]) -> None:
    result = ranks(world).run(train, cls, tmp_path, "--max_steps", 6, "--do_val")[0]  # the loader is read again
    reference = ranks(1).run(train, OwnLoader, tmp_path / "one", "--max_steps", 6, "--do_val")[0]
    assert losses(result.log) == pytest.approx(losses(reference.log), rel=1e-5)
    assert list(losses(result.log, "val")) == [6]
    assert result.records[-1]["tokens"] == 2 * 2 * 12 * world


def test_an_own_loader_resumes_where_it_was(ranks: Pools, tmp_path: Path) -> None:
    whole = ranks(2).run(train, OwnLoader, tmp_path / "whole", "--max_steps", 6, "--lr_schedule", "constant")[0]
    for steps in (2, 5, 6):
        part = ranks(2).run(train, OwnLoader, tmp_path / "parts", "--max_steps", steps, "--lr_schedule", "constant")[0]
    assert part.log == whole.log


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (OwnLoaderWithoutBatches, "DataError: train_loader gave no batch"),
        (NoData, "ConfigError: _init_dataset set no training data; set self.train_dataset or self.train_loader"),
        (
            OwnLoaderOnly,
            "ConfigError: the training data has no length; set the length of the run: --max_steps or --max_tr",
        ),
        (OwnLoaderOfTexts, "DataError: a loader must give input_ids and labels"),
    ],
)
def test_a_loader_that_cannot_be_used_is_one_error(
    ranks: Pools, tmp_path: Path, cls: type[Trainer], message: str
) -> None:
    for error in ranks(1).run(user_error, cls, tmp_path):
        assert error.startswith(message)
