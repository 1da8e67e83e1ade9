"""The ledger against allocations one can count by hand."""

from __future__ import annotations

import torch

from tinytron.planner.ledger import AllocationTracker


def test_storages_count_once_until_the_last_view_is_gone() -> None:
    with AllocationTracker() as ledger:
        whole = torch.zeros(100)
        part = whole[:3].view(3, 1)
        assert (ledger.live, ledger.peak) == (400, 400)
        del whole
        assert ledger.live == 400  # a part keeps all of it
        del part
        assert (ledger.live, ledger.peak) == (0, 400)


def test_known_storages_do_not_count() -> None:
    weight = torch.zeros(100)
    with AllocationTracker([weight]) as ledger:
        _ = weight.view(10, 10).t()
        assert ledger.peak == 0
        weight.add_(1)
        assert ledger.peak == 0


def test_the_peak_has_a_phase() -> None:
    with AllocationTracker() as ledger:
        ledger.phase = "first"
        x = torch.zeros(10)
        ledger.phase = "second"
        y = x + 1
        del x, y
        ledger.phase = "third"
        z = torch.zeros(15)
    assert (ledger.peak, ledger.peak_phase, ledger.live) == (80, "second", z.nbytes)


def test_kernels_on_a_cpu_copy_operands_of_another_precision() -> None:
    total, part = torch.zeros(100), torch.zeros(100, dtype=torch.bfloat16)
    for on_cpu, copied in ((True, 400), (False, 0)):
        with AllocationTracker([total, part], on_cpu=on_cpu) as ledger:
            total += part
        assert (ledger.peak, ledger.live) == (copied, 0)
    with AllocationTracker([total, part], on_cpu=True) as ledger:
        _ = total * part
    assert ledger.peak == 400 + 400  # the result is there at the same time
    with AllocationTracker([total], on_cpu=True) as ledger:
        total += 1.0
    assert ledger.peak == 0
