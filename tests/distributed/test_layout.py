"""Rank arithmetic, at sizes no test machine has."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytron.distributed.layout import ParallelLayout, divisors
from tinytron.errors import ConfigError


def test_eight_ranks_written_out() -> None:
    layout = ParallelLayout(8, sep=2, ep=4)
    assert layout.dp == 4
    assert {axis: layout.ranks(axis) for axis in layout.axes} == {
        "world": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "sep": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "dp": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "ep": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "edp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "self": [[0], [1], [2], [3], [4], [5], [6], [7]],
    }


POWERS = [2**k for k in range(11)]


@pytest.mark.parametrize("sep", POWERS)
def test_1024_ranks_by_the_formula(sep: int) -> None:
    for ep in POWERS:
        layout = ParallelLayout(1024, sep, ep)
        assert layout.dp * sep == 1024
        assert layout.ranks("sep") == [[d * sep + s for s in range(sep)] for d in range(layout.dp)]
        assert layout.ranks("dp") == [[d * sep + s for d in range(layout.dp)] for s in range(sep)]
        assert layout.ranks("ep") == [[d * ep + e for e in range(ep)] for d in range(1024 // ep)]
        assert layout.ranks("edp") == [[d * ep + e for d in range(1024 // ep)] for e in range(ep)]


@settings(deadline=None)
@given(world=st.integers(1, 300), data=st.data())
def test_every_axis_partitions_the_world(world: int, data: st.DataObject) -> None:
    sep, ep = (data.draw(st.sampled_from(divisors(world))) for _ in range(2))
    layout = ParallelLayout(world, sep, ep)
    for axis in layout.axes:
        groups = layout.ranks(axis)
        assert sorted(itertools.chain(*groups)) == list(range(world))
        assert len({len(group) for group in groups}) == 1
        assert all(group == sorted(group) for group in groups)
        assert all(layout.group_of(rank, axis) == group for group in groups[:5] for rank in group)
    for a, b in (("dp", "sep"), ("edp", "ep")):  # two groups that cross have one rank in common
        for first, second in itertools.product(layout.ranks(a)[:5], layout.ranks(b)[:5]):
            assert len(set(first) & set(second)) == 1


def test_experts_share_the_sequence_group_unless_told_otherwise() -> None:
    assert ParallelLayout(8, sep=4).ep == 4
    assert ParallelLayout(8, sep=4).ranks("ep") == ParallelLayout(8, sep=4).ranks("sep")
    assert ParallelLayout(8, sep=4, ep=1).ep == 1


def test_one_rank_has_groups_of_one() -> None:
    layout = ParallelLayout(1)
    assert all(layout.ranks(axis) == [[0]] for axis in layout.axes)


@pytest.mark.parametrize("size", [5, 7, 24, -1, -2])
@pytest.mark.parametrize("flag", ["sep", "ep"])
def test_sizes_divide_the_world(flag: str, size: int) -> None:
    text = rf"--{flag}_size {size} must divide the number of processes, 12; use one of \[1, 2, 3, 4, 6, 12\]"
    with pytest.raises(ConfigError, match=text):
        ParallelLayout(12, **{flag: size})
    for works in (1, 2, 3, 4, 6, 12):
        ParallelLayout(12, **{flag: works})


def test_divisors_are_all_of_them_in_order() -> None:
    assert divisors(1) == [1]
    assert divisors(13) == [1, 13]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
