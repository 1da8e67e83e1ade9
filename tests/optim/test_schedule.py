"""Learning rates pinned at the first step, the end of the warm-up and the last step, and their shape between."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytron.optim import Schedule
from tinytron.optim.schedule import SCHEDULES

MAX, MIN = 4e-3, 3e-5
DECAYING = ["cosine", "linear", "polynomial", "cosine_with_restarts", "wsd", "wsds"]
NAMES = [*DECAYING, "constant", "inverse_sqrt"]
SAME = {"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}


def test_these_are_all_schedules() -> None:
    assert sorted([*NAMES, *SAME, "cosine_rewarm"]) == sorted(SCHEDULES)
    for theirs, ours in SAME.items():
        assert [schedule(theirs)(t) for t in range(111)] == [schedule(ours)(t) for t in range(111)]


def schedule(name: Any = "cosine", warmup_steps: int = 10, max_steps: int = 111, **options: Any) -> Schedule:
    return Schedule(name, MAX, MIN, warmup_steps, max_steps, **options)


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_and_never_zero(name: str) -> None:
    rates = [schedule(name)(t) for t in range(10)]
    assert rates == exactly([MAX * k / 10 for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
    assert rates[9] == MAX


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_can_begin_at_a_fraction_of_the_peak(name: str) -> None:
    """The linear warm-up of optax, which theseus begins at 0.01: the first step after it is the first at the peak."""
    rates = schedule(name, warmup_start=0.01)
    assert [rates(t) for t in range(10)] == exactly([MAX * (0.01 + 0.099 * t) for t in range(10)])
    assert rates(10) == MAX
    assert [rates(t) for t in range(10, 111)] == [schedule(name)(t) for t in range(10, 111)]
    assert schedule(name, warmup_start=1.0)(0) == MAX


@pytest.mark.parametrize(("name", "last"), [*((name, MIN) for name in DECAYING), ("constant", MAX)])
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


def test_linear_is_a_line_and_polynomial_a_power_of_it() -> None:
    line, square = schedule("linear"), schedule("polynomial", power=2.0)
    assert [line(35), line(60), line(85)] == exactly([MIN + (MAX - MIN) * part for part in (0.75, 0.5, 0.25)])
    assert [square(35), square(60)] == exactly([MIN + (MAX - MIN) * part for part in (0.75**2, 0.25)])


def test_restarts_are_cosines_of_equal_length() -> None:
    rates, wave = schedule("cosine_with_restarts", cycles=4), schedule(max_steps=36)
    assert [rates(t) for t in range(10, 35)] == exactly([wave(t) for t in range(10, 35)])  # 25 of 100 steps each
    assert rates(35) == rates(60) == rates(85) == MAX
    assert rates(110) == MIN


def test_inverse_sqrt_falls_by_the_root_of_the_steps() -> None:
    rates, long = schedule("inverse_sqrt"), schedule("inverse_sqrt", warmup_steps=0)
    assert rates(10) == MAX
    assert [rates(40), rates(90), rates(10**6)] == exactly([MAX / 2, MAX / 3, MAX * math.sqrt(1e-5)])
    assert [long(0), long(30_000)] == exactly([MAX, MAX / 2])


@pytest.mark.parametrize(
    ("name", "theirs", "options", "kwargs"),
    [
        ("cosine", "cosine", {}, {}),
        ("cosine_with_min_lr", "cosine_with_min_lr", {"min_lr": MIN}, {"min_lr": MIN}),
        ("linear", "linear", {}, {}),
        ("polynomial", "polynomial", {"power": 3.0, "min_lr": MIN}, {"power": 3.0, "lr_end": MIN}),
        ("cosine_with_restarts", "cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("constant_with_warmup", "constant_with_warmup", {}, {}),
        ("inverse_sqrt", "inverse_sqrt", {}, {}),
        ("wsd", "warmup_stable_decay", {"decay_shape": "sqrt"}, {"num_decay_steps": 11, "decay_type": "1-sqrt"}),
    ],
)
def test_the_rates_are_those_of_transformers(name: Any, theirs: str, options: Any, kwargs: Any) -> None:
    """One step earlier in the warm-up, whose first step has the rate 0 there, and in a run that is one step shorter, whose
    decay would end after its last step there. Ours of 12 decaying steps has 11 intervals."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=MAX)
    scheduler = transformers.get_scheduler(
        theirs, optimizer, num_warmup_steps=10, num_training_steps=110, scheduler_specific_kwargs=kwargs
    )
    factor = scheduler.lr_lambdas[0]
    ours = Schedule(**{"min_lr": 0.0, **options}, name=name, max_lr=MAX, warmup_steps=10, max_steps=111)
    if name == "wsd":
        ours = replace(ours, decay_fraction=12 / 111)
    assert [ours(t) for t in range(10)] == exactly([MAX * factor(t + 1) for t in range(10)])
    assert [replace(ours, warmup_start=0.0)(t) for t in range(10)] == exactly([MAX * factor(t) for t in range(10)])
    assert [ours(t) for t in range(10, 111)] == pytest.approx([MAX * factor(t) for t in range(10, 111)], abs=1e-18)


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


@pytest.mark.parametrize("name", NAMES)
def test_without_warm_up_the_first_step_has_the_peak(name: str) -> None:
    assert schedule(name, warmup_steps=0)(0) == MAX


@given(
    name=st.sampled_from([name for name in NAMES if name != "cosine_with_restarts"]),
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
    assert name == "inverse_sqrt" or all(v >= MIN for v in after)
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_a_schedule_counts_optimizer_steps_not_micro_batches() -> None:
    """A run of 8 steps has 8 rates, whatever its accumulation: asking again for a step gives the same."""
    rates = schedule(warmup_steps=2, max_steps=8)
    with_accumulation = [rates(micro // 4) for micro in range(32)]
    assert with_accumulation[::4] == [rates(t) for t in range(8)]
    assert with_accumulation[-1] == MIN


def test_wsds_stays_at_the_minimum_after_its_decay() -> None:
    rates = schedule(
        "wsds", max_steps=200, warmup_steps=10, decay_fraction=0.1, decay_shape="linear", constant_fraction=0.5
    )
    found = [rates(step) for step in range(200)]
    assert found[9:80] == [rates.max_lr] * 71  # the decay is steps 80 to 99
    assert found[80] == rates.max_lr > found[81] > found[98] > found[99] == rates.min_lr
    assert found[99:] == [rates.min_lr] * 101
    whole = schedule("wsds", max_steps=200, warmup_steps=10, constant_fraction=0.0)
    assert [whole(step) for step in range(200)] == [
        schedule("wsd", max_steps=200, warmup_steps=10)(s) for s in range(200)
    ]


def test_wsds_of_a_short_run() -> None:
    rates = schedule("wsds", max_steps=3, warmup_steps=2, constant_fraction=0.9)
    assert [rates(step) for step in range(3)] == [rates.max_lr / 2, rates.max_lr, rates.min_lr]


# The re-warmed cosine.


def rewarmed(max_steps: int = 200, warmup_steps: int = 10, **options: Any) -> Schedule:
    return schedule("cosine_rewarm", warmup_steps, max_steps, **{"stages": (0.5, 0.8), "rewarm_lr": 1e-3, **options})


def test_each_stage_is_warmed_up_and_decays_to_the_minimum() -> None:
    rates = rewarmed()
    assert [rates(0), rates(9), rates(10), rates(99)] == exactly([MAX / 10, MAX, MAX, MIN])
    for first, last in ((100, 159), (160, 199)):
        assert [rates(first), rates(first + 9), rates(first + 10), rates(last)] == exactly([1e-4, 1e-3, 1e-3, MIN])
        middle = (first + 10 + last) / 2
        assert rates(math.floor(middle)) + rates(math.ceil(middle)) == exactly(1e-3 + MIN)
        assert all(rates(t) > rates(t + 1) for t in range(first + 10, last))
    assert rates(200) == rates(10**6) == MIN
    whole = schedule(max_steps=100)
    assert [rates(t) for t in range(100)] == [whole(t) for t in range(100)]


def test_every_stage_begins_its_warm_up_at_the_same_fraction() -> None:
    rates = rewarmed(warmup_start=0.01)
    assert [rates(0), rates(100), rates(110), rates(160)] == exactly([0.01 * MAX, 1e-5, 1e-3, 1e-5])


def test_a_short_stage_warms_up_for_a_tenth_of_it() -> None:
    rates = rewarmed(stages=(0.9,), warmup_steps=20)
    assert [rates(179), rates(180), rates(181), rates(182), rates(199)] == exactly([MIN, 5e-4, 1e-3, 1e-3, MIN])
    tiny = rewarmed(max_steps=3, warmup_steps=1)
    assert [tiny(t) for t in range(4)] == exactly([MAX, MIN, 1e-3, 1e-3])  # 3 steps: 2, none and 1 of them
