"""A CPU that multiplies slowly in 16 bits is told about at the start of a run, with the rates that were measured."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, train
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.training import Trainer, world
from tinytron.utils import profile

Pools = Callable[[int], Ranks]
Rates = dict[torch.dtype, float]

SLOW: Rates = {torch.bfloat16: 20e9, torch.float16: 5e9, torch.float32: 200e9, torch.float64: 100e9}
FAST: Rates = SLOW | {torch.bfloat16: 900e9}
EQUAL: Rates = SLOW | {torch.bfloat16: 195e9}


def _patched(rates: Rates) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    for module in (profile, world):
        patch.setattr(module, "measured_matmul_rate", lambda device, dtype, seconds=0.3: rates[dtype])
    return patch


def _measured(rates: Rates, precision: str) -> tuple[float, list[str]]:
    """A job for the pool."""
    patch = _patched(rates)
    try:
        state = ParallelState.create(ParallelLayout(torch.distributed.get_world_size()), torch.device("cpu"))
        return world.measure_peak(config_of(*TINY, "--precision", precision), state)
    finally:
        patch.undo()


def _measured_with(variables: dict[str, str]) -> tuple[float, list[str]]:
    """A job for the pool."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "PJRT_DEVICE"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        return _measured(SLOW, "fp32")


@pytest.mark.parametrize(
    ("rates", "precision", "says"),
    [
        (SLOW, "bf16", "bf16 is slow on this CPU: matrix products run at 40 GFLOP/s, in fp32 at 400 GFLOP/s; "),
        (SLOW, "fp16", "fp16 is slow on this CPU: matrix products run at 10 GFLOP/s, in fp32 at 400 GFLOP/s; "),
        (FAST, "bf16", None),
        (EQUAL, "bf16", None),
        (SLOW, "fp32", None),
        (SLOW, "fp64", None),
    ],
)
def test_the_rates_of_all_ranks_are_compared(ranks: Pools, rates: Rates, precision: str, says: str | None) -> None:
    for total, lines in ranks(2).run(_measured, rates, precision):
        dtype = world.DTYPES[precision]
        assert total == pytest.approx(2 * rates[dtype])
        assert lines[0].startswith("peak matmul rate for MFU: ")
        if says is None:
            assert len(lines) == 1
        else:
            assert len(lines) == 2
            assert lines[1].startswith(says + "--precision fp32 would be faster")


def _trained(log_dir: Path) -> tuple[str, int]:
    patch = _patched(SLOW)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run = train(Trainer, log_dir, "--precision", "bf16", "--max_steps", 1)
        return printed.getvalue(), run.step
    finally:
        patch.undo()


def test_it_is_said_once_and_the_run_goes_on(ranks: Pools, tmp_path: Path) -> None:
    ((printed, step),) = ranks(1).run(_trained, tmp_path)
    assert printed.count("bf16 is slow on this CPU") == 1
    assert step == 1


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, False),
        ({"TPU_WORKER_ID": "0"}, True),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, True),
        ({"PJRT_DEVICE": "TPU"}, True),
        ({"PJRT_DEVICE": "CPU"}, False),
    ],
)
def test_a_tpu_that_is_not_used_is_said(ranks: Pools, variables: dict[str, str], found: bool) -> None:
    ((_, lines),) = ranks(1).run(_measured_with, variables)
    assert ("this machine has a TPU, but Tinytron has no TPU backend" in " ".join(lines)) == found
