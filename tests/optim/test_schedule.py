"""Learning rates pinned at the first step, the end of the warm-up and the last step, and their shape between."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytron.optim import Schedule

MAX, MIN = 4e-3, 3e-5


def schedule(name: Any = "cosine", warmup_steps: int = 10, max_steps: int = 111, **options: Any) -> Schedule:
    return Schedule(name, MAX, MIN, warmup_steps, max_steps, **options)


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_warm_up_is_linear_and_never_zero(name: str) -> None:
    rates = [schedule(name)(t) for t in range(10)]
    assert rates == exactly([MAX * k / 10 for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
    assert rates[9] == MAX


@pytest.mark.parametrize(("name", "last"), [("cosine", MIN), ("constant", MAX), ("wsd", MIN)])
def test_the_first_step_after_the_warm_up_and_the_last_are_exact(name: str, last: float) -> None:
    assert schedule(name)(10) == MAX
    assert schedule(name)(110) == last
    assert schedule(name)(111) == schedule(name)(10**6) == last  # a run continued beyond its end


def test_cosine_is_half_a_wave_over_the_steps_after_the_warm_up() -> None:
    rates = [schedule()(t) for t in range(10, 111)]
    assert rates[25] == exactly(MIN + (MAX - MIN) * (0.5 + 0.5 * math.sqrt(0.5)))
    assert rates[50] == exactly((MAX + MIN) / 2)
    assert rates[75] == exactly(MIN + (MAX - MIN) * (0.5 - 0.5 * math.sqrt(0.5)))
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_constant_is_constant() -> None:
    assert {schedule("constant")(t) for t in range(9, 200)} == {MAX}


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [("linear", 3 / 4, 1 / 2), ("cosine", 0.5 + 0.5 * math.sqrt(0.5), 1 / 2), ("sqrt", 1 / 2, 1 - math.sqrt(0.5))],
)
def test_wsd_stays_and_then_decays_in_its_shape(shape: Any, quarter: float, half: float) -> None:
    # 205 steps of which the last fifth, 41, decay: 40 intervals from step 164, still at the peak, to step 204
    rates = schedule("wsd", max_steps=205, decay_fraction=0.2, decay_shape=shape)
    assert {rates(t) for t in range(9, 165)} == {MAX}
    assert rates(165) < MAX
    assert rates(174) == exactly(MIN + (MAX - MIN) * quarter)
    assert rates(184) == exactly(MIN + (MAX - MIN) * half)
    assert rates(204) == MIN


def test_wsd_decay_does_not_begin_before_the_warm_up_ends() -> None:
    rates = schedule("wsd", max_steps=100, warmup_steps=40, decay_fraction=1.0, decay_shape="linear")
    assert rates(39) == rates(40) == MAX
    assert rates(41) == exactly(MAX - (MAX - MIN) / 59)


@pytest.mark.parametrize("max_steps", [2, 5, 10, 14])
def test_wsd_of_a_short_run_ends_at_the_minimum(max_steps: int) -> None:
    """A tenth of so few steps is one step: only the last is lower."""
    rates = schedule("wsd", warmup_steps=1, max_steps=max_steps)
    assert [rates(t) for t in range(max_steps)] == [MAX] * (max_steps - 1) + [MIN]


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(name: str) -> None:
    assert schedule(name, warmup_steps=0)(0) == MAX


@given(
    name=st.sampled_from(["cosine", "constant", "wsd"]),
    max_steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    fraction=st.floats(0.0, 1.0, exclude_min=True),
    shape=st.sampled_from(["linear", "cosine", "sqrt"]),
)
def test_every_rate_is_between_the_limits_and_rises_once(
    name: Any, max_steps: int, warmup: int, fraction: float, shape: Any
) -> None:
    rates = Schedule(name, MAX, MIN, warmup, max_steps, fraction, shape)
    values = [rates(t) for t in range(max_steps + 2)]
    assert all(0 < v <= MAX for v in values)
    after = values[warmup:]
    assert all(v >= MIN for v in after)
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_a_schedule_counts_optimizer_steps_not_micro_batches() -> None:
    """A run of 8 steps has 8 rates, whatever its accumulation: asking again for a step gives the same."""
    rates = schedule(warmup_steps=2, max_steps=8)
    with_accumulation = [rates(micro // 4) for micro in range(32)]
    assert with_accumulation[::4] == [rates(t) for t in range(8)]
    assert with_accumulation[-1] == MIN
