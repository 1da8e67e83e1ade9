"""Training time without evaluation and saving, by a clock that the test moves."""

from __future__ import annotations

import pytest

from tinytron.metrics import TrainClock


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_laps_count_from_the_last_lap() -> None:
    hand = Hand()
    clock = TrainClock(now=hand)
    hand.time += 3
    assert clock.lap() == 3
    assert clock.lap() == 0
    hand.time += 2
    assert clock.lap() == 2


def test_pauses_do_not_count() -> None:
    hand = Hand()
    clock = TrainClock(now=hand)
    hand.time += 1
    for seconds in (10, 20):
        with clock.paused():
            hand.time += seconds
        hand.time += 0.5
    assert clock.lap() == 2


def test_a_pause_counts_for_its_own_lap_only() -> None:
    hand = Hand()
    clock = TrainClock(now=hand)
    with clock.paused():
        hand.time += 10
    assert clock.lap() == 0
    hand.time += 4
    assert clock.lap() == 4


def test_a_pause_that_fails_does_not_count_either() -> None:
    hand = Hand()
    clock = TrainClock(now=hand)

    def fail() -> None:
        with clock.paused():
            hand.time += 10
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    hand.time += 1
    assert clock.lap() == 1
