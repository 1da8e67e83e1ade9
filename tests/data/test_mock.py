"""Mock samples are a function of (seed, number) alone."""

from __future__ import annotations

import pytest
import torch

from tinytron.data import MockDataset


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    first, longer = MockDataset(10, 8, 50, seed=3), MockDataset(99, 8, 50, seed=3)
    assert len(first) == 10
    expected = [first[i]["input_ids"].tolist() for i in range(10)]
    torch.manual_seed(1)
    assert [longer[i]["input_ids"].tolist() for i in reversed(range(10))] == expected[::-1]
    assert len({tuple(row) for row in expected}) == 10
    assert MockDataset(10, 8, 50, seed=4)[0]["input_ids"].tolist() not in expected


def test_labels_are_the_next_tokens() -> None:
    sample = MockDataset(10, 8, 50, seed=3)[4]
    assert sample["input_ids"].shape == sample["labels"].shape == (8,)
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert torch.equal(sample["input_ids"][1:], sample["labels"][:-1])


def test_tokens_fill_the_vocabulary() -> None:
    seen = torch.cat([MockDataset(20, 64, 50, seed=3)[i]["labels"] for i in range(20)])
    assert set(seen.tolist()) == set(range(50))


def test_an_offset_gives_other_samples() -> None:
    train = MockDataset(10, 8, 50, seed=3)
    shifted = MockDataset(10, 8, 50, seed=3, offset=4)
    assert torch.equal(shifted[0]["labels"], train[4]["labels"])


@pytest.mark.parametrize("index", [10, 11, -1])
def test_there_is_no_sample_beyond_the_last(index: int) -> None:
    with pytest.raises(IndexError, match=f"sample {index} of 10"):
        MockDataset(10, 8, 50, seed=3)[index]


def test_a_loop_over_the_samples_ends() -> None:
    assert sum(1 for _ in MockDataset(10, 8, 50, seed=3)) == 10  # type: ignore[attr-defined]


def test_the_fingerprint_names_what_samples_depend_on() -> None:
    settings = [(10, 8, 50, 3, 0), (11, 8, 50, 3, 0), (10, 9, 50, 3, 0), (10, 8, 51, 3, 0), (10, 8, 50, 4, 0)]
    assert len({MockDataset(*s).fingerprint() for s in [*settings, (10, 8, 50, 3, 1)]}) == 6
    assert MockDataset(*settings[0]).fingerprint() == MockDataset(*settings[0]).fingerprint()
