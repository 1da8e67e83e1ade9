"""The spike detector against its rule in plain Python, on the live ranks, and its state."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.metrics import spikes
from tinytron.metrics.spikes import PATIENCE, Spike, SpikeDetector

Pools = Callable[[int], Ranks]
Steps = list[tuple[float, float]]  # loss and gradient norm of the whole world
CPU = torch.device("cpu")


class Naive:
    """The rule of docs/reliability.md, step by step, on lists."""

    def __init__(self, sigma: float, window: int) -> None:
        self.sigma, self.window = sigma, window
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.in_a_row = 0

    def rejects(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        for value, kept in ((loss, self.losses), (norm, self.norms)):
            if len(kept) < min(self.window, PATIENCE):
                continue
            if value > statistics.fmean(kept) + self.sigma * statistics.pstdev(kept):
                self.in_a_row += 1
                if self.in_a_row == PATIENCE:
                    self.losses, self.norms, self.in_a_row = [], [], 0
                return True
        self.losses, self.norms = [*self.losses, loss][-self.window :], [*self.norms, norm][-self.window :]
        self.in_a_row = 0
        return False


def _random_steps(count: int) -> Steps:
    draw = random.Random(5)
    steps = [(draw.gauss(4, 0.1), draw.gauss(1, 0.05)) for _ in range(count)]
    for i in range(0, count, 7):
        steps[i] = draw.choice([(draw.uniform(4, 6), 1.0), (4.0, draw.uniform(1, 2)), (math.nan, 1.0), (4.0, math.inf)])
    for i in range(count // 2, count):
        steps[i] = (steps[i][0] + 5, steps[i][1])  # other data from here on
    return steps


def _judged(steps: Steps, sigma: float, window: int, resume_every: int = 0) -> list[bool]:
    """On two ranks whose shares of a loss say nothing by themselves."""
    assert dist.group.WORLD is not None
    detector, found = SpikeDetector(sigma, window, CPU, dist.group.WORLD), []
    for step, (loss, norm) in enumerate(steps, 1):
        share = loss / 2 + (1 - 2 * dist.get_rank()) * (step * 7 % 5)
        reject = detector.judge(step, torch.tensor(share, dtype=torch.float64))
        assert reject is not None
        found.append(bool(reject(torch.tensor(norm, dtype=torch.float64))))
        if resume_every and step % resume_every == 0:
            state = detector.state_dict()
            detector = SpikeDetector(sigma, window, CPU, dist.group.WORLD)
            detector.load_state_dict(state)
    return found


@pytest.mark.parametrize(("sigma", "window"), [(3.0, 30), (1.0, 5), (4.0, 100)])
def test_it_keeps_the_rule_on_all_ranks(ranks: Pools, sigma: float, window: int) -> None:
    steps, naive = _random_steps(200), Naive(sigma, window)
    expected = [naive.rejects(*step) for step in steps]
    assert 20 < sum(expected) < 160
    assert ranks(2).run(_judged, steps, sigma, window) == [expected] * 2
    assert ranks(2).run(_judged, steps, sigma, window, 9) == [expected] * 2  # resumed every 9 steps


def _after(steps: Steps, **state: Any) -> tuple[list[Spike | None], dict[str, Any]]:
    assert dist.group.WORLD is not None
    detector = SpikeDetector(3.0, 4, CPU, dist.group.WORLD)
    if state:
        detector.load_state_dict(state)
    for step, (loss, norm) in enumerate(steps, 1):
        reject = detector.judge(step, torch.tensor(loss))
        assert reject is not None
        reject(torch.tensor(norm))
    return [detector.first_spike(), detector.first_spike()], detector.state_dict()


def test_the_first_spike_is_told_once(ranks: Pools) -> None:
    calm = [(1.0, 1.0), (3.0, 1.0), (1.0, 1.0), (3.0, 1.0)]
    ((found, state),) = ranks(1).run(_after, [*calm, (math.nan, 1.0), (5.5, 1.0), (9.0, 9.0)])
    assert found == [Spike(6, "loss", 5.5, 2 + 3 * 1.0), None]
    assert state == {"values": {"loss": [1, 3, 1, 3], "grad norm": [1, 1, 1, 1]}, "in_a_row": 2}
    ((found, _),) = ranks(1).run(_after, [*calm, (2.0, 1.5)])
    assert found == [Spike(5, "grad norm", 1.5, 1.0), None]
    ((found, _),) = ranks(1).run(_after, [*calm, (5.0, 1.0)])  # at the limit
    assert found == [None, None]


def _loaded() -> dict[str, Any]:
    assert dist.group.WORLD is not None
    detector = SpikeDetector(3.0, 3, CPU, dist.group.WORLD)
    detector.load_state_dict(
        {"values": {"loss": [1.0, 2.0, 3.0, 4.0], "grad norm": [5.0, 6.0, 7.0, 8.0]}, "in_a_row": 1}
    )
    return detector.state_dict()


def test_of_a_longer_window_the_newest_values_are_kept(ranks: Pools) -> None:
    assert ranks(1).run(_loaded) == [{"values": {"loss": [2, 3, 4], "grad norm": [6, 7, 8]}, "in_a_row": 1}]


def _off() -> tuple[Any, Any]:
    assert dist.group.WORLD is not None
    detector = SpikeDetector(0.0, 3, CPU, dist.group.WORLD)
    return detector.judge(1, torch.tensor(1.0)), detector.first_spike()


def test_off_costs_nothing(ranks: Pools) -> None:
    assert ranks(1).run(_off) == [(None, None)]


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: whoever asked for one would get an error."""
    group: Any = object()
    monkeypatch.setattr(spikes, "sum_over", lambda tensor, _: tensor)
    detector = SpikeDetector(3.0, 5, torch.device("meta"), group)
    for step in (1, 2):
        reject = detector.judge(step, torch.empty((), device="meta"))
        assert reject is not None
        assert reject(torch.empty((), device="meta")).device.type == "meta"
    with pytest.raises(RuntimeError):
        detector.first_spike()
