"""Who reads which sample when: written down as loops, and compared over layouts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from tinytron.data import Batch, GlobalBatchSampler, ShuffledEpochs, build_train_loader, build_val_loader
from tinytron.data.batch import as_batch
from tinytron.data.loader import size_of
from tinytron.errors import DataError


class Rows(Dataset[Any]):
    """Sample i is made by ``make(i)``; by default four tokens that tell i."""

    def __init__(self, count: int, make: Any = lambda i: [i, i + 1, i + 2, i + 3]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def sampler(
    num_samples: int = 10, *, global_batch: int = 8, micro_batch: int = 1, rank: int = 0, dp: int = 1, seed: int = 7
) -> GlobalBatchSampler:
    order = ShuffledEpochs(num_samples, seed)
    return GlobalBatchSampler(order, global_batch=global_batch, micro_batch=micro_batch, dp_rank=rank, dp_size=dp)


def micro_batches(of: GlobalBatchSampler, steps: int) -> list[list[list[int]]]:
    """The micro-batches of each of the next ``steps`` steps."""
    per_step = of.global_batch // (of.micro_batch * of.dp_size)
    flat = list(itertools.islice(of, steps * per_step))
    return [flat[i : i + per_step] for i in range(0, len(flat), per_step)]


# Training.


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_together_read_the_global_batch(dp: int, micro_batch: int) -> None:
    """Of 48 samples; 11 samples in the data, so that batches straddle epochs."""
    sizes: dict[str, int] = {"global_batch": 48, "dp": dp}
    whole = sampler(11, global_batch=48)
    ranks = [micro_batches(sampler(11, **sizes, micro_batch=micro_batch, rank=r), 5) for r in range(dp)]
    for step in range(5):
        rows = [ranks[r][step][m] for m in range(48 // (dp * micro_batch)) for r in range(dp)]
        assert all(len(row) == micro_batch for row in rows)
        assert [i for row in rows for i in row] == whole.samples_of_step(step)


@settings(max_examples=40, deadline=None)
@given(num_samples=st.integers(1, 40), global_batch=st.integers(1, 30), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(num_samples: int, global_batch: int, seed: int) -> None:
    walker = sampler(num_samples, global_batch=global_batch, seed=seed)
    steps = -(-3 * num_samples // global_batch)
    walk = [i for step in range(steps) for i in walker.samples_of_step(step)]
    for epoch in range(3):
        assert sorted(walk[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    walker = sampler(50, global_batch=50)
    orders = [walker.samples_of_step(epoch) for epoch in range(4)]
    orders.append(sampler(50, global_batch=50, seed=8).samples_of_step(0))
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert orders[0] != list(range(50))


def test_the_order_depends_on_the_walk_not_on_the_batch() -> None:
    walks = []
    for global_batch in (1, 4, 12, 24):
        walker = sampler(11, global_batch=global_batch)
        walks.append([i for step in range(24 // global_batch) for i in walker.samples_of_step(step)])
    assert all(walk == walks[0] for walk in walks)


@pytest.mark.parametrize("start", [1, 3, 1000])
def test_a_start_step_skips_what_came_before(start: int) -> None:
    from_there = sampler(11, global_batch=8, micro_batch=2, rank=1, dp=2)
    from_there.start_step = start
    expected = []
    for step in (start, start + 1):
        samples = sampler(11, global_batch=8).samples_of_step(step)
        expected.append([samples[2:4], samples[6:8]])
    assert micro_batches(from_there, 2) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_step_is_the_end(workers: int) -> None:
    of = sampler(11, global_batch=8, micro_batch=2, rank=1, dp=2)
    of.start_step, of.stop_step = 2, 4
    expected = micro_batches(of, 10)
    assert [len(step) for step in expected] == [2, 2]
    loader = build_train_loader(Rows(11), of, num_workers=workers, pin_memory=False)
    assert [batch.input_ids[:, 0].tolist() for batch in loader] == [row for step in expected for row in step]


def test_a_long_walk_is_that_of_its_steps() -> None:
    """Much longer than what is worked out at once, of a rank in the middle."""
    whole, steps = sampler(70, global_batch=96), 400
    expected = []
    for step in range(steps):
        samples = whole.samples_of_step(step)
        expected.append([samples[16:32], samples[64:80]])
    assert micro_batches(sampler(70, global_batch=96, micro_batch=16, rank=1, dp=3), steps) == expected


def test_a_rank_works_out_its_own_rows_only() -> None:
    asked: list[np.ndarray[Any, Any]] = []

    class Watched(ShuffledEpochs):
        def __call__(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            asked.append(positions)
            return super().__call__(positions)

    of = GlobalBatchSampler(Watched(70, 7), global_batch=2**15, micro_batch=2, dp_rank=3, dp_size=4)
    next(iter(of))
    assert [positions.tolist() for positions in asked] == [[p for p in range(2**15) if p // 2 % 4 == 3]]


@pytest.mark.parametrize("end", [24, 30, 20000, 20003])
def test_an_order_is_not_asked_for_more_than_the_stop_step(end: int) -> None:
    class Ending(ShuffledEpochs):
        def __call__(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if positions.max() >= end:
                raise DataError("the order ends")
            return super().__call__(positions)

    of = GlobalBatchSampler(Ending(11, 7), global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)
    of.stop_step = end // 8
    assert list(of) == [sampler(11).samples_of_step(step) for step in range(end // 8)]


def test_an_indivisible_batch_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="the global batch must divide into micro-batches"):
        sampler(global_batch=8, micro_batch=3)


def train_loader(dataset: Dataset[Any], workers: int = 0, **options: int) -> Iterator[Batch]:
    return iter(build_train_loader(dataset, sampler(**options), num_workers=workers, pin_memory=True))


def test_the_loader_yields_the_samplers_rows() -> None:
    loader = train_loader(Rows(10), micro_batch=2)
    found = [batch.input_ids[:, 0].tolist() for batch in itertools.islice(loader, 8)]
    assert found == [row for step in micro_batches(sampler(micro_batch=2), 2) for row in step]


def test_workers_do_not_change_the_order() -> None:
    batches = [
        [batch.input_ids.tolist() for batch in itertools.islice(train_loader(Rows(10), workers), 12)]
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1]


@pytest.mark.parametrize(("workers", "ahead", "each"), [(2, 16, 8), (3, 16, 6), (2, 0, 2)])
def test_workers_together_keep_steps_ready(workers: int, ahead: int, each: int) -> None:
    loader = build_train_loader(Rows(10), sampler(), num_workers=workers, pin_memory=False, ahead=ahead)
    assert loader.prefetch_factor == each


# Items.


ROW = [5, 6, 7, 8]
ITEMS = {
    "list": lambda i: ROW,
    "tuple": lambda i: tuple(ROW),
    "uint16": lambda i: np.array(ROW, np.uint16),
    "int32 tensor": lambda i: torch.tensor(ROW, dtype=torch.int32),
    "dict of lists": lambda i: {"input_ids": ROW[:-1], "labels": ROW[1:]},
    "dict of tensors and more": lambda i: {
        "labels": torch.tensor(ROW[1:]), "input_ids": np.array(ROW[:-1]), "weights": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ITEMS)
def test_items_become_int64_rows_with_shifted_labels(kind: str) -> None:
    batch = next(train_loader(Rows(4, ITEMS[kind]), num_samples=4, micro_batch=2))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.tolist() == [[5, 6, 7]] * 2
    assert batch.labels.tolist() == [[6, 7, 8]] * 2


def test_labels_of_a_dict_are_taken_as_they_are() -> None:
    item = {"input_ids": ROW, "labels": [-100, 1, 2, -100]}
    assert next(train_loader(Rows(10, lambda i: item))).labels.tolist() == [[-100, 1, 2, -100]]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda i: {"input_ids": ROW, "mask": ROW}, r"keys \['input_ids', 'mask'\] but lacks \['labels'\]"),
        (lambda i: {"text": "x"}, r"keys \['text'\] but lacks \['input_ids', 'labels'\]"),
        (lambda i: [ROW, ROW], r"must be a dict or a row of seq_len \+ 1 token ids, not shape \[2, 4\]"),
        (lambda i: 3, r"must be a dict or a row of seq_len \+ 1 token ids, not shape \[\]"),
        (lambda i: list(range(i + 2)), r"have different lengths \[\d+, \d+\]; cut or pad them alike"),
        (lambda i: {"input_ids": ROW, "labels": ROW[1:]}, r"different lengths \[3, 4\]; cut or pad them alike"),
    ],
)
def test_items_of_another_form_are_refused(make: Any, text: str) -> None:
    loader = train_loader(Rows(10, make), micro_batch=2)
    with pytest.raises(DataError, match=text):
        next(loader)


def test_the_size_of_a_data_set_must_be_known_and_positive() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield ROW

    assert size_of(Rows(3)) == 3
    with pytest.raises(
        DataError, match=r"Stream has no __len__; give it one, or make it a torch.utils.data.IterableDataset"
    ):
        size_of(Stream())
    with pytest.raises(DataError, match="Rows is empty"):
        size_of(Rows(0))


PAIR = (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "given", [Batch(*PAIR), PAIR, list(PAIR), {"labels": PAIR[1], "input_ids": PAIR[0], "mask": None}]
)
def test_a_foreign_loader_may_give_pairs_or_dicts(given: Any) -> None:
    batch = as_batch(given)
    assert isinstance(batch, Batch)
    assert batch.input_ids is PAIR[0]
    assert batch.labels is PAIR[1]


@pytest.mark.parametrize(
    "given",
    [{"input_ids": PAIR[0]}, PAIR[:1], (*PAIR, PAIR[0]), PAIR[0], (PAIR[0], [[1]]), (PAIR[0][0], PAIR[1][0]), 3],
)
def test_other_batches_of_a_foreign_loader_are_refused(given: Any) -> None:
    with pytest.raises(
        DataError, match=r"a loader must give input_ids and labels, integer tensors \[B, S\]: a dict, a pair"
    ):
        as_batch(given)


# Validation.


def val_batches(count: int, dp: int, micro_batch: int, workers: int = 0) -> list[list[Batch]]:
    """The batches of every rank."""
    return [
        list(
            build_val_loader(
                Rows(count),
                num_samples=count,
                micro_batch=micro_batch,
                dp_rank=r,
                dp_size=dp,
                num_workers=workers,
                pin_memory=False,
            )
        )
        for r in range(dp)
    ]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 13])
def test_validation_reads_each_sample_once_in_equally_many_batches(count: int, dp: int, micro_batch: int) -> None:
    ranks = val_batches(count, dp, micro_batch)
    assert len({len(batches) for batches in ranks}) == 1
    real: Counter[int] = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.input_ids.shape == batch.labels.shape == (micro_batch, 3)
        for inputs, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            if labels == [-100] * 3:
                assert inputs == [0, 1, 2]  # a real row whose labels do not count
            else:
                assert labels == [inputs[0] + 1, inputs[0] + 2, inputs[0] + 3]
                real[inputs[0]] += 1
    assert real == Counter(range(count))
    assert len(ranks[0]) == -(-count // (dp * micro_batch))


def test_validation_can_be_repeated_and_shared_by_workers() -> None:
    loader = build_val_loader(
        Rows(5), num_samples=5, micro_batch=2, dp_rank=0, dp_size=1, num_workers=0, pin_memory=False
    )
    first, second = ([batch.labels.tolist() for batch in loader] for _ in range(2))
    assert first == second
    assert [batch.labels.tolist() for batch in val_batches(5, 1, 2, workers=2)[0]] == first


def test_a_batch_moves_to_a_device() -> None:
    batch = Batch(torch.zeros(1, 2), torch.ones(1, 2)).to(torch.device("meta"))
    assert isinstance(batch, Batch)
    assert {t.device.type for t in (batch.input_ids, batch.labels)} == {"meta"}
