"""Sizes of global batches by step, and the order of samples that follows from them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_streams import Stream
from tinytron.data import GlobalBatchSampler, ShuffledEpochs
from tinytron.data.streams import StreamLoader
from tinytron.utils.batch_sizes import BatchSizes, Skips

GROWING = BatchSizes(16, ((4, 2), (8, 5)))  # 4 4 8 8 8 16 16 ...


@st.composite
def sizes(draw: st.DrawFn) -> BatchSizes:
    ends = sorted(draw(st.sets(st.integers(1, 12), max_size=3)))
    return BatchSizes(draw(st.integers(1, 9)), tuple((draw(st.integers(1, 9)), end) for end in ends))


@given(batch=sizes(), steps=st.integers(0, 20), sequences=st.integers(0, 120))
@settings(deadline=None)
def test_places_and_counts_agree_with_the_sizes(batch: BatchSizes, steps: int, sequences: int) -> None:
    assert batch.before(steps) == sum(batch.at(step) for step in range(steps))
    within = batch.steps_within(sequences)
    assert batch.before(within) <= sequences < batch.before(within + 1)
    assert (
        batch.before(batch.steps_for(sequences) - 1)
        < max(1, sequences)
        <= max(1, batch.before(batch.steps_for(sequences)))
    )
    ranges = [range(first, int(stop)) for first, stop in batch.runs(steps, steps + 9)]
    assert [step for part in ranges for step in part] == list(range(steps, steps + 9))
    assert all(len({batch.at(step) for step in part}) == 1 for part in ranges)


def test_sizes_by_step() -> None:
    assert [GROWING.at(step) for step in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert list(GROWING.runs(1, math.inf)) == [(1, 2), (2, 5), (5, math.inf)]
    assert list(GROWING.sizes()) == [16, 4, 8]


@pytest.mark.parametrize("start", [0, 1, 2, 4, 6])
@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_ranks_together_read_growing_batches_in_order(dp: int, micro_batch: int, start: int, stream: bool) -> None:
    """Each sample once, whatever the layout, and from any step."""
    order = ShuffledEpochs(70, 7)
    share = {"global_batch": GROWING, "micro_batch": micro_batch, "dp_size": dp}
    ranks: list[list[list[int]]] = []
    batches = (GROWING.before(8) - GROWING.before(start)) // (micro_batch * dp)
    for rank in range(dp):
        if stream:
            loader = StreamLoader(Stream(1000), **share, dp_rank=rank)  # type: ignore[arg-type]
            loader.start_step = start
            ranks.append([b.input_ids[:, 0].tolist() for b in itertools.islice(loader, batches)])
        else:
            sampler = GlobalBatchSampler(order, **share, dp_rank=rank)  # type: ignore[arg-type]
            sampler.start_step, sampler.stop_step = start, 8
            ranks.append(list(sampler))
    read = [sample for batch in zip(*ranks, strict=True) for rows in batch for sample in rows]
    whole = GlobalBatchSampler(order, global_batch=GROWING, micro_batch=1, dp_rank=0, dp_size=1)
    expected = [sample for step in range(start, 8) for sample in whole.samples_of_step(step)]
    assert read == (list(range(GROWING.before(start), GROWING.before(8))) if stream else expected)
    assert [len(whole.samples_of_step(step)) for step in range(8)] == [GROWING.at(step) for step in range(8)]


@given(batch=sizes(), moves=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4))
@settings(deadline=None)
def test_a_run_that_goes_back_reads_on_where_it_was(batch: BatchSizes, moves: list[tuple[int, int]]) -> None:
    """Against a list of the positions that every step read; a move is some steps on, and then some steps back."""
    read: list[list[int]] = []  # by step, of the steps that count
    saved = {0: Skips()}  # by the step of a checkpoint
    skips, position, passed = Skips(), 0, []
    for on, back in moves:
        for _ in range(on):
            read.append(list(range(position, position := position + batch.at(len(read)))))
            saved[len(read)] = skips
        to = max(0, len(read) - back)
        skips = saved[to].going_back(to, skips.position(len(read), batch), batch)
        del read[to:]
        passed = [row for row in range(position) if not any(row in rows for rows in read)]
    read.append(list(range(position, position + batch.at(len(read)))))
    for step, rows in enumerate(read):
        assert rows == [skips.position(step, batch) + n for n in range(batch.at(step))]
    assert [row for first, stop in skips.ranges(batch) for row in range(first, stop)] == passed
    assert [at for at, _ in skips.parts] == sorted({at for at, _ in skips.parts})
    assert Skips.of([list(part) for part in skips.parts]) == skips


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_samplers_pass_over_what_is_skipped(dp: int, micro_batch: int) -> None:
    """Also in one walk across the step before which sequences are passed over."""
    order, skips = ShuffledEpochs(70, 7), Skips(((3, 24),))
    listed = order(np.arange(200)).tolist()
    for start in (0, 3, 4):
        found: dict[int, list[int]] = {}
        for rank in range(dp):
            sampler = GlobalBatchSampler(order, global_batch=GROWING, micro_batch=micro_batch, dp_rank=rank, dp_size=dp)
            sampler.start_step, sampler.stop_step, sampler.skips = start, 7, skips
            batches = iter(sampler)
            for step in range(start, 7):
                for first in range(rank * micro_batch, GROWING.at(step), micro_batch * dp):
                    found.setdefault(step, [0] * GROWING.at(step))[first : first + micro_batch] = next(batches)
        for step, rows in found.items():
            first = GROWING.before(step) + 24 * (step >= 3)
            assert rows == listed[first : first + GROWING.at(step)] == sampler.samples_of_step(step)
