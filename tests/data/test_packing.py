"""Packing against best-fit-decreasing one piece at a time, and against the fewest rows possible."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytron.data.packing import PackIndex, best_fit, pack_index


def bins_of(lengths: npt.ArrayLike, capacity: int) -> list[list[int]]:
    order, ends = best_fit(lengths, capacity)
    assert order.dtype == ends.dtype == np.int64
    return [part.tolist() for part in np.split(order, ends[:-1])] if len(ends) else []


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition: longest first, into the fullest bin that has room; of equals, the one filled so longest ago."""
    bins: list[list[int]] = []
    room: list[int] = []
    touched: list[int] = []
    for time, piece in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[piece]]
        if not fitting:
            bins, room, touched = [*bins, []], [*room, capacity], [*touched, 0]
        b = min(fitting, key=lambda b: (room[b], touched[b]), default=len(bins) - 1)
        bins[b].append(piece)
        room[b] -= lengths[piece]
        touched[b] = time
    return bins


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying every bin for every piece."""

    def search(rest: list[int], rooms: tuple[int, ...], best: int) -> int:
        if len(rooms) >= best or not rest:
            return min(len(rooms), best)
        for room in set(rooms):
            if room >= rest[0]:
                i = rooms.index(room)
                best = search(rest[1:], (*rooms[:i], room - rest[0], *rooms[i + 1 :]), best)
        return search(rest[1:], (*rooms, capacity - rest[0]), best)

    return search(sorted(lengths, reverse=True), (), len(lengths) + 1)


@st.composite
def pieces(draw: st.DrawFn, capacities: st.SearchStrategy[int], most: int = 60) -> tuple[list[int], int]:
    """Lengths and a capacity. Few different lengths, so that many are equal, or any."""
    capacity = draw(capacities)
    any_length = st.integers(1, capacity)
    some = draw(st.lists(any_length, min_size=1, max_size=4))
    return draw(st.lists(st.one_of(st.sampled_from(some), any_length), max_size=most)), capacity


def lognormal(count: int, mean: float = 800) -> npt.NDArray[np.int64]:
    return np.ceil(np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count)).astype(np.int64)


# Bins.


@settings(max_examples=300, deadline=None)
@given(given_pieces=pieces(st.one_of(st.integers(1, 30), st.integers(200, 1200), st.sampled_from([255, 256, 65536]))))
def test_equals_best_fit_decreasing_one_by_one(given_pieces: tuple[list[int], int]) -> None:
    assert bins_of(*given_pieces) == one_by_one(*given_pieces)


@pytest.mark.parametrize("capacity", [16, 40, 64, 512])
def test_many_pieces_one_by_one(capacity: int) -> None:
    lengths = np.minimum(lognormal(2000, mean=capacity / 5), capacity).tolist()
    assert bins_of(lengths, capacity) == one_by_one(lengths, capacity)
    even = np.random.default_rng(1).integers(1, capacity * 2 // 3, 2000).tolist()
    assert bins_of(even, capacity) == one_by_one(even, capacity)


@settings(max_examples=100, deadline=None)
@given(given_pieces=pieces(st.integers(1, 20), most=7))
def test_is_near_the_fewest_bins(given_pieces: tuple[list[int], int]) -> None:
    """Within what first-fit-decreasing guarantees: 11/9 of the fewest plus 6/9 (Dosa, ESCAPE 2007)."""
    lengths, capacity = given_pieces
    assert 9 * len(bins_of(lengths, capacity)) <= 11 * fewest(lengths, capacity) + 6


@pytest.mark.parametrize("capacity", [512, 4096, 65536, 2**17])
def test_no_bin_overflows_and_no_two_fit_into_one(capacity: int) -> None:
    lengths = np.minimum(lognormal(20_000), capacity)
    order, ends = best_fit(lengths, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    loads = np.add.reduceat(lengths[order], np.concatenate(([0], ends[:-1])))
    assert loads.max() <= capacity
    assert np.sort(loads)[:2].sum() > capacity
    longest = lengths[order][np.concatenate(([0], ends[:-1]))]
    assert (np.diff(longest) <= 0).all()


def test_little_room_is_left_over() -> None:
    """Concatenation would leave none and cut most documents; a document to a row would leave four fifths."""
    ends = lognormal(50_000).cumsum()
    index = pack_index(ends[:-1], int(ends[-1]), 4096)
    assert 1 - (ends[-1] - 1) / (len(index.row_ends) * 4096) < 1e-3


def test_order_of_the_same_pieces_is_the_same() -> None:
    lengths = np.minimum(lognormal(5000), 4096)
    first, again = best_fit(lengths, 4096), best_fit(lengths.astype(np.uint32), 4096)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_no_pieces_need_no_bins() -> None:
    assert bins_of([], 8) == []


@pytest.mark.parametrize("lengths", [[0, 3], [9], [-1]])
def test_pieces_that_are_no_pieces(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="pieces must have 1 to 8 tokens"):
        best_fit(lengths, 8)


# Rows of a shard.


def rows_of(index: PackIndex) -> list[list[tuple[int, int]]]:
    pairs = list(zip(index.piece_starts.tolist(), index.piece_lengths.tolist(), strict=True))
    ends = index.row_ends.tolist()
    return [pairs[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@st.composite
def shards(draw: st.DrawFn) -> tuple[list[int], int]:
    """Starts of documents, some of them empty, and a shard's number of tokens."""
    num_tokens = draw(st.integers(0, 200))
    return sorted(draw(st.lists(st.integers(0, num_tokens), max_size=20))), num_tokens


@settings(max_examples=300, deadline=None)
@given(shard=shards(), seq_len=st.integers(1, 40))
def test_every_pair_is_in_one_piece_of_one_document(shard: tuple[list[int], int], seq_len: int) -> None:
    starts, num_tokens = shard
    index = pack_index(np.array(starts, dtype=np.uint32), num_tokens, seq_len)
    assert {a.dtype for a in index} == {np.dtype(np.uint32)}
    rows = rows_of(index)
    assert all(0 < sum(length for _, length in row) <= seq_len for row in rows)
    pieces = sorted(piece for row in rows for piece in row)
    assert [i for start, length in pieces for i in range(start, start + length)] == list(range(num_tokens - 1))
    for start, length in pieces:
        assert not any(start < begin < start + length for begin in starts)
        # A piece ends where its document does, or has filled a row.
        assert length == seq_len or start + length in {*starts, num_tokens - 1}


def test_rows_by_hand() -> None:
    """23 tokens: three of a document from the shard before, then documents of 5, 9, 2 and 4."""
    index = pack_index([3, 8, 17, 19], 23, 6)
    # Pairs (start, length): (0, 3), (3, 5), (8, 6) and (14, 3), (17, 2), (19, 3).
    assert rows_of(index) == [[(8, 6)], [(3, 5)], [(0, 3), (14, 3)], [(19, 3), (17, 2)]]


@pytest.mark.parametrize(("starts", "num_tokens"), [([], 0), ([0], 1), ([], 1), ([0, 1], 1)])
def test_a_shard_without_pairs_has_no_rows(starts: list[int], num_tokens: int) -> None:
    assert [len(a) for a in pack_index(starts, num_tokens, 8)] == [0, 0, 0]


@pytest.mark.parametrize("starts", [[3, 2], [-1, 4], [0, 11]])
def test_starts_must_ascend_within_the_shard(starts: list[int]) -> None:
    with pytest.raises(AssertionError, match="document starts must ascend, from 0 to 10"):
        pack_index(starts, 10, 8)


def test_offsets_must_fit() -> None:
    with pytest.raises(AssertionError, match="offsets are uint32"):
        pack_index([0], 2**32, 8)


def test_the_last_offsets_of_the_largest_shard_are_right() -> None:
    largest = 2**32 - 1
    index = pack_index([0, largest - 3], largest, 2**16)
    assert (int(index.piece_starts[-1]), int(index.piece_lengths[-1])) == (largest - 3, 2)
    assert index.piece_lengths.sum(dtype=np.int64) == largest - 1
