"""A formula that must be a bijection, and a different one for every key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytron.data.permutation import Permutation

NEAR_POWERS = [2**k + d for k in range(1, 12) for d in (-1, 0, 1)]
SIZES = st.one_of(st.integers(1, 70), st.integers(1, 3000), st.sampled_from(NEAR_POWERS))
KEYS = st.integers(0, 2**63 - 1)


def order(n: int, *key: int) -> list[int]:
    return [int(i) for i in Permutation(n, *key)(np.arange(n))]


@settings(max_examples=150, deadline=None)
@given(n=SIZES, seed=KEYS, epoch=st.integers(0, 1000))
def test_every_item_comes_exactly_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch)) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=SIZES, seed=KEYS)
def test_an_item_does_not_depend_on_the_question(n: int, seed: int) -> None:
    """One position, some, or all: the same answers, and the caller's array is not written to."""
    permutation, positions = Permutation(n, seed), np.arange(n)
    whole = permutation(positions)
    assert [int(permutation(np.array([i]))[0]) for i in (0, n // 2, n - 1)] == [whole[i] for i in (0, n // 2, n - 1)]
    assert (permutation(positions[::-1]) == whole[::-1]).all()
    assert (positions == np.arange(n)).all()


@settings(max_examples=50, deadline=None)
@given(seed=KEYS, epoch=st.integers(0, 1000))
def test_every_part_of_the_key_matters(seed: int, epoch: int) -> None:
    base = order(200, seed, epoch)
    for other in ((seed + 1, epoch), (seed, epoch + 1), (seed, epoch, 0), (epoch, seed + 1)):
        same = sum(a == b for a, b in zip(base, order(200, *other), strict=True))
        assert same < 20  # one is expected


def test_the_order_looks_random() -> None:
    """Neighbors are not neighbors any more, and places are filled evenly over keys."""
    orders = np.array([order(64, seed) for seed in range(400)])
    counts = np.stack([np.bincount(orders[:, position], minlength=64) for position in range(64)])
    chi_squared = ((counts - 400 / 64) ** 2 / (400 / 64)).sum()
    degrees = 63 * 63
    assert abs(chi_squared - degrees) < 6 * (2 * degrees) ** 0.5
    steps = np.abs(np.diff(orders, axis=1))
    assert steps.mean() == pytest.approx(65 / 3, rel=0.05)  # mean distance of two different items of 64


def test_the_order_is_frozen() -> None:
    """A resumed run of an older version must go on in the same order."""
    assert order(12, 1337, 0) == [7, 5, 11, 2, 6, 10, 3, 8, 0, 4, 9, 1]


def test_a_huge_number_of_items_costs_nothing() -> None:
    n = 10**15
    items = Permutation(n, 3)(np.array([0, 1, n - 1]))
    assert len(set(items.tolist())) == 3
    assert all(0 <= i < n for i in items.tolist())


def test_one_item() -> None:
    assert order(1, 5) == [0]


def test_no_item_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="a permutation needs at least one item"):
        Permutation(0, 5)
