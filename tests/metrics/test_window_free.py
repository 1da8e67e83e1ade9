"""The window of steps between two reports, without processes: the sum over ranks is stood in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinytron.metrics import StepRecord, StepWindow, window

GROUP: Any = object()


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was summed over the ranks, of which the other has the same losses."""
    calls: list[torch.Tensor] = []

    def sum_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        assert group is GROUP
        calls.append(tensor.clone())
        return tensor.mul_(2)

    monkeypatch.setattr(window, "sum_over", sum_over)
    return calls


def test_losses_are_summed_over_ranks_once_and_norms_are_not(summed: list[torch.Tensor]) -> None:
    steps = StepWindow(GROUP)
    for step in (1, 2, 3):
        parts = {"loss": torch.tensor(float(step)), "moe_z": torch.tensor(0.5), "moe_balance": torch.tensor(7.0 * step)}
        steps.add(step, 0.1 * step, parts, torch.tensor(10.0 * step))
    assert summed == []  # nothing is exchanged, and the host waits for nothing, before the report
    assert steps.flush() == [
        StepRecord(1, 2.0, 0.1, 10.0, {"moe_z": 1.0, "moe_balance": 14.0}),
        StepRecord(2, 4.0, 0.2, 20.0, {"moe_z": 1.0, "moe_balance": 28.0}),
        StepRecord(3, 6.0, 0.1 * 3, 30.0, {"moe_z": 1.0, "moe_balance": 42.0}),
    ]
    assert len(summed) == 1
    assert summed[0].dtype == torch.float64


def test_a_value_with_a_count_is_divided_by_that_of_all_ranks(summed: list[torch.Tensor]) -> None:
    steps = StepWindow(GROUP)
    for step, count in ((1, 4), (2, 0)):
        parts = {"loss": torch.tensor(1.0), "moe_z": torch.tensor(6.0), "other": torch.tensor(0.25)}
        steps.add(step, 0.1, parts, torch.tensor(1.0), {"moe_z": torch.tensor(count)})
    first, second = steps.flush()
    assert first.aux == {"moe_z": 1.5, "other": 0.5}
    assert second.aux == {"moe_z": 12.0, "other": 0.5}  # of nothing the sum
    assert len(summed) == 1


def test_a_flush_empties_the_window(summed: list[torch.Tensor]) -> None:
    steps = StepWindow(GROUP)
    assert steps.flush() == []
    steps.add(1, 0.1, {"loss": torch.tensor(1.0)}, torch.tensor(1.0))
    steps.flush()
    assert steps.flush() == []
    assert len(summed) == 1  # an empty window is no collective
    steps.add(2, 0.1, {"loss": torch.tensor(3.0)}, torch.tensor(4.0))
    assert steps.flush() == [StepRecord(2, 6.0, 0.1, 4.0, {})]


def test_precisions_may_differ_and_nan_is_reported(summed: list[torch.Tensor]) -> None:
    steps = StepWindow(GROUP)
    parts = {"loss": torch.tensor(0.1, dtype=torch.float32), "moe_z": torch.tensor(1 / 3, dtype=torch.float64)}
    steps.add(1, 0.1, parts, torch.tensor(float("nan"), dtype=torch.float64))
    (record,) = steps.flush()
    assert record.loss == pytest.approx(0.2, rel=1e-6)
    assert record.aux == {"moe_z": 2 / 3}
    assert record.grad_norm != record.grad_norm


def test_a_record_gives_all_its_values_by_name() -> None:
    fields = StepRecord(3, 2.0, 0.1, 5.0, {"moe_z": 0.25}).fields()
    assert fields == {"step": 3, "loss": 2.0, "lr": 0.1, "grad_norm": 5.0, "moe_z": 0.25}
