"""Weight decay by step, rates by parameter, and averaged weights, next to the plain twin on every kind of layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parity import CLIPPED, EXPERTS, Case, differences, run_case
from tests.helpers.ranks import Ranks
from tests.naive.training import Recipe
from tinytron.optim import Rates

Pools = Callable[[int], Ranks]
STEADY = Rates(lambda step: 0.01, max_lr=0.02, max_steps=9, decay=0.5, decay_end=0.1)


def decays(rates: Rates, groups: list[dict[str, Any]], steps: int) -> list[list[float]]:
    """The weight decay of each group in each step."""
    found = []
    for step in range(steps):
        rates.apply(groups, step, rates.lr(step))
        found.append([group["weight_decay"] for group in groups])
    return found


def test_weight_decay_goes_from_the_first_to_the_last_value() -> None:
    line = decays(replace(STEADY, decay_schedule="linear"), [{"weight_decay": 0.5}, {"weight_decay": 0.0}], 10)
    assert [own for own, _ in line] == pytest.approx([0.5 - 0.05 * t for t in range(9)] + [0.1], rel=1e-12)
    assert {none for _, none in line} == {0.0}
    wave = [own for (own,) in decays(replace(STEADY, decay_schedule="cosine"), [{"weight_decay": 0.5}], 9)]
    assert [wave[0], wave[2], wave[4], wave[8]] == pytest.approx([0.5, 0.3 + 0.2 * math.sqrt(0.5), 0.3, 0.1], rel=1e-12)
    rising = replace(STEADY, decay_schedule="cosine", decay=0.1, decay_end=0.5)
    assert [own for (own,) in decays(rising, [{"weight_decay": 0.1}], 9)][::4] == pytest.approx([0.1, 0.3, 0.5])


def test_weight_decay_can_follow_the_rate() -> None:
    rates = replace(STEADY, lr=lambda step: 0.02 / (step + 1), decay_schedule="lr")
    assert decays(rates, [{"weight_decay": 0.5}], 2) == [[0.5], [0.25]]


def test_groups_of_ones_own_optimizer() -> None:
    """A constant schedule leaves their decay alone, and a group may have none."""
    groups: list[dict[str, Any]] = [{"weight_decay": 0.3, "lr_mult": 2.0}, {}]
    STEADY.apply(groups, 3, 0.01)
    assert groups == [{"weight_decay": 0.3, "lr_mult": 2.0, "lr": 0.02}, {"lr": 0.01}]
    replace(STEADY, decay_schedule="linear").apply(groups, 8, 0.01)
    assert "weight_decay" not in groups[1]


RECIPES = {
    "adamw": replace(CLIPPED, weight_decay=5.0, last_decay=1.0, layer_decay=0.6, ema_decay=0.7),
    "muon": Recipe("muon", weight_decay=2.0, last_decay=6.0, layer_decay=0.6, ema_decay=0.7),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, accumulation=2),
        Case(2, shard=False, small_buckets=True),
        Case(2, sep=2, accumulation=2),
        Case(4, sep=2, ep=2, experts=EXPERTS),
    ],
    ids=["one", "replicated", "sequence", "experts"],
)
def test_scheduled_decay_layer_wise_rates_and_averages_are_those_of_the_twin(
    ranks: Pools, tmp_path: Path, case: Case, name: str
) -> None:
    case = replace(case, precision="fp64", recipe=RECIPES[name])
    found = differences(case, ranks(case.world).run(run_case, case, tmp_path))
    assert not found, "\n".join(found)
