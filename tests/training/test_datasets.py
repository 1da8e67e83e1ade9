"""What the trainer makes of a data set: a validation split, a fingerprint, and a check of its ids."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.helpers.errors import says
from tinytron.data import Batch, MockDataset
from tinytron.errors import ConfigError, DataError
from tinytron.training.batch_preparer import check_batch
from tinytron.training.datasets import fingerprint, split_off_validation


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


@pytest.mark.parametrize(("count", "rate", "train"), [(100, 0.99, 99), (100, 0.5, 50), (3, 0.5, 2), (10, 0.05, None)])
def test_validation_is_the_end_of_the_data(count: int, rate: float, train: int | None) -> None:
    if train is None:
        with pytest.raises(ConfigError, match=r"--split_rate 0.05 of 10 samples leaves none for training"):
            split_off_validation(numbers(count), rate)
        return
    first, last = split_off_validation(numbers(count), rate)
    assert [int(first[i][0]) for i in range(train)] == list(range(train))
    assert [int(last[i][0]) for i in range(count - train)] == list(range(train, count))


@pytest.mark.parametrize(("count", "rate"), [(10, 0.99), (10, 1.0), (3, 0.9), (2, 0.99), (10**7, 1.0)])
def test_a_split_without_validation_names_a_rate_that_works(count: int, rate: float) -> None:
    with pytest.raises(ConfigError, match=rf"--split_rate {rate} of {count} samples leaves none") as caught:
        split_off_validation(MockDataset(count, 4, 10, 0), rate)
    proposed = re.search(r"use ([\d.]+), set val_dataset, or drop --do_val", str(caught.value))
    assert proposed is not None
    _, last = split_off_validation(MockDataset(count, 4, 10, 0), float(proposed.group(1)))
    assert len(last) >= 1  # type: ignore[arg-type]


def test_the_fingerprint_tells_data_and_split_apart() -> None:
    mock = MockDataset(100, 4, 10, 0)
    first, _ = split_off_validation(mock, 0.9)
    assert fingerprint(mock) == mock.fingerprint()
    assert fingerprint(first) == f"first 90 of {mock.fingerprint()}"
    assert fingerprint(numbers(7)) == "TensorDataset:7"


def batch(inputs: list[int], labels: list[int]) -> Batch:
    return Batch(torch.tensor([inputs]), torch.tensor([labels]))


@pytest.mark.parametrize("ids", [([0, 6], [6, -100]), ([3, 3], [-100, -100])])
def test_ids_in_the_vocabulary_and_ignored_labels_pass(ids: tuple[list[int], list[int]]) -> None:
    check_batch(batch(*ids), 2, 7)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (([0, 7], [6, -100]), "... token id 7 ... 0..6 ... --vocab_size ..."),
        (([0, 6], [9, -100]), "... token id 9 ... 0..6 ... --vocab_size ..."),
        (([-1, 6], [6, 6]), "... token id -1 ... 0..6 ... -100"),
        (([0, 6], [6, -1]), "... token id -1 ... 0..6 ... -100"),
        (([-100, 6], [6, 6]), "... token id -100 ... 0..6 ... -100"),
    ],
)
def test_other_ids_are_named(ids: tuple[list[int], list[int]], text: str) -> None:
    with pytest.raises(DataError, match=says(text)):
        check_batch(batch(*ids), 2, 7)


@pytest.mark.parametrize("seq_len", [1, 3])
def test_samples_of_another_length_are_named(seq_len: int) -> None:
    with pytest.raises(DataError, match=says(f"... 2 tokens ... --seq_len is {seq_len} ...")):
        check_batch(batch([0, 6], [6, -100]), seq_len, 7)
