"""Which bucket is reduced when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinytron.distributed.zero1.schedule import Bucket, ReductionSchedule


@st.composite
def buckets(draw: st.DrawFn) -> dict[Bucket, list[int]]:
    """Parameters, by their places in the order of registration, dealt out to the buckets of three buffers."""
    places = draw(st.permutations(range(draw(st.integers(1, 12)))))
    found: dict[Bucket, list[int]] = {}
    for place in places:
        found.setdefault((draw(st.integers(0, 2)), draw(st.integers(0, 2))), []).append(place)
    return found


@given(positions=buckets(), data=st.data())
def test_complete_buckets_start_in_one_order(positions: dict[Bucket, list[int]], data: st.DataObject) -> None:
    schedule = ReductionSchedule(positions)
    assert [min(positions[bucket]) for bucket in schedule.order] == sorted(map(min, positions.values()), reverse=True)
    gradients = [(bucket, place) for bucket, places in positions.items() for place in places]
    for _ in range(2):  # steps
        left = {bucket: set(places) for bucket, places in positions.items()}
        started: list[Bucket] = []
        for bucket, place in data.draw(st.permutations(gradients)):
            assert not schedule.has(bucket[0], place)
            for _ in range(data.draw(st.integers(1, 2))):  # a parameter that is used twice counts once
                schedule.arrive(bucket, place)
            assert schedule.has(bucket[0], place)
            left[bucket].discard(place)
            started += schedule.due(only_complete=True)
            count = next((i for i, b in enumerate(schedule.order) if left[b]), len(schedule.order))
            assert started == schedule.order[:count]
        assert list(schedule.due(only_complete=False)) == []
        schedule.reset()


def test_what_is_left_starts_without_its_gradients() -> None:
    schedule = ReductionSchedule({(0, 0): [3, 2], (0, 1): [0], (1, 0): [1, 4]})
    schedule.arrive((0, 1), 0)
    assert list(schedule.due(only_complete=True)) == []
    schedule.arrive((0, 0), 2)
    schedule.arrive((0, 0), 3)
    assert list(schedule.due(only_complete=True)) == [(0, 0)]
    assert list(schedule.due(only_complete=False)) == [(1, 0), (0, 1)]
    assert list(schedule.due(only_complete=False)) == []
