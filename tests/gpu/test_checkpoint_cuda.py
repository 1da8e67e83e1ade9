"""Checkpoints of a GPU: a resumed run is the one that was not stopped, and they load on the CPU and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.device import DEVICE, GPU_TEST, only_a_gpu_shows
from tests.gpu.trained import EXPERTS, SMALL
from tests.helpers.runs import config_of, read_logs
from tinytron.checkpoint.snapshot import HostBuffers
from tinytron.training import Trainer
from tinytron.training.run import reporter

pytestmark = GPU_TEST
# Saved in a thread while step 3 runs; the schedule does not depend on where a run ends.
RUN: tuple[object, ...] = (
    *SMALL,
    "--save_every_steps",
    2,
    "--log_every",
    1,
    "--lr_schedule",
    "constant",
    "--async_save",
)
SCALE = 1024.0  # of fp16 losses


@pytest.fixture(autouse=True)
def _no_measured_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "measure_peak", lambda config, state: (1e12, []))  # half a second a run


def trained_until(last: int, log_dir: Path, *flags: object) -> tuple[Path, dict[int, tuple[float, float]]]:
    """Train to step ``last``, from the newest checkpoint if there is one: the run's folder; losses and norms by step."""
    trainer = Trainer(config_of(*RUN, "--log_dir", log_dir, "--max_steps", last, *flags))
    if not trainer.step and trainer.config.train.precision == "fp16":
        trainer.optimizer.loss_scale.fill_(SCALE)  # not the one that every run begins with
    trainer.train()
    dist.destroy_process_group()
    assert trainer.step == last
    return trainer.log_dir, {
        r["step"]: (r["loss"], r["grad_norm"]) for r in read_logs(trainer.log_dir)[1] if "loss" in r
    }


def saved(folder: Path, step: int) -> dict[str, Any]:
    """The model that was saved after ``step``."""
    weights: dict[str, Any] = torch.load(folder / f"{step:05d}_model.pt", weights_only=True)
    return weights


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16 --dropout 0.1",
        f"--precision bf16 {EXPERTS} --moe_bias_update_rate 0.01",
        "--precision fp16 --optimizer muon",
    ],
    ids=["bf16 dropout", "experts", "fp16 muon"],
)
def test_a_resumed_run_is_bit_identical(flags: str, tmp_path: Path) -> None:
    """Weights, optimizer states, the generator of dropout, the loss scale and the place in the data."""
    given = (*flags.split(), "--deterministic")
    unbroken, expected = trained_until(4, tmp_path / "unbroken", *given)
    trained_until(2, tmp_path / "broken", *given)
    broken, found = trained_until(4, tmp_path / "broken", *given)
    assert found == expected
    assert sorted(found) == [1, 2, 3, 4]
    mine, theirs = saved(broken, 4), saved(unbroken, 4)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    mine, theirs = (torch.load(folder / "00004_meta.pt", weights_only=True) for folder in (broken, unbroken))
    assert mine["counters"] == theirs["counters"]
    assert mine["counters"]["scale"] == (SCALE if "fp16" in flags else 1.0)


@pytest.mark.parametrize(
    ("flags", "first", "second"),
    [("", "auto", "gloo"), (EXPERTS, "gloo", "auto")],
    ids=["dense to the CPU", "experts to the GPU"],
)
def test_a_run_moves_to_the_other_device(flags: str, first: str, second: str, tmp_path: Path) -> None:
    """Two steps on one, two on the other: the losses of a run that stayed."""
    given = (*flags.split(), "--precision", "fp32", "--disable_tf32")
    _, expected = trained_until(4, tmp_path / "stayed", *given, "--backend", first)
    trained_until(2, tmp_path / "moved", *given, "--backend", first)
    folder, found = trained_until(4, tmp_path / "moved", *given, "--backend", second)
    for step in (1, 2, 3, 4):
        assert found[step] == pytest.approx(expected[step], rel=1e-4), step
    assert {weight.device.type for weight in saved(folder, 2).values()} == {"cpu"}


def test_copies_for_a_save_are_pinned() -> None:
    """Or copying them would wait for the device, tensor by tensor."""
    source = torch.arange(1000.0, device=DEVICE)
    buffers = HostBuffers()
    copy = buffers.copy("key", source)
    torch.cuda.synchronize()
    assert torch.equal(copy, torch.arange(1000.0))
    assert buffers.copy("key", source + 1).data_ptr() == copy.data_ptr()
    only_a_gpu_shows("pinned memory")
    assert copy.is_pinned()
