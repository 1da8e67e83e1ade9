"""P9 with real processes: SIGKILL at any moment, start again, and the log is that of a run that was left alone."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import TINY, kill, losses, run_well, start
from tinytron.checkpoint import newest_checkpoint

FLAGS: tuple[object, ...] = (
    *TINY,
    *("--mock_data_num_samples", 200, "--max_steps", 60, "--do_val", "--val_every_steps", 7, "--save_every_steps", 3),
    *("--log_every", 4, "--log_dir", "log"),
)
BF16 = ("--precision", "bf16", "--dropout", 0.1)


def _folder(cwd: Path) -> Path | None:
    return next(iter((cwd / "log").glob("tiny_*")), None)


def _newest(cwd: Path) -> int:
    folder = _folder(cwd)
    newest = newest_checkpoint(folder) if folder else None
    return newest.step if newest else 0


@pytest.mark.parametrize(
    ("processes", "flags", "kills"),
    [
        pytest.param(0, (), 3, id="fp32"),
        pytest.param(0, BF16, 8, id="bf16_dropout", marks=pytest.mark.slow),
        pytest.param(2, BF16, 4, id="two_ranks", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_as_unbroken_ones(
    tmp_path: Path, processes: int, flags: tuple[object, ...], kills: int
) -> None:
    one, two = tmp_path / "unbroken", tmp_path / "killed"
    one.mkdir()
    two.mkdir()
    run_well(*FLAGS, *flags, cwd=one, processes=processes)
    moment, reached = random.Random(kills), []
    for _ in range(kills):
        process = start(*FLAGS, *flags, cwd=two, processes=processes)
        before, deadline = _newest(two), time.monotonic() + 60
        while _newest(two) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.1))  # in a step, in a save, in a validation
        kill(process)
        process.communicate()
        reached.append(_newest(two))
    assert 0 < reached[0] < 60, f"the first kill came too early or too late: checkpoints {reached}"
    finished = run_well(*FLAGS, *flags, cwd=two, processes=processes)
    folders = [folder for cwd in (one, two) if (folder := _folder(cwd))]
    logs = [(folder / "log.txt").read_bytes() for folder in folders]
    assert logs[1] == logs[0], f"killed at checkpoints {reached}\n{finished.stdout}"
    assert list(losses(logs[0].decode())) == list(range(1, 61))
    weights = [torch.load(folder / "00060_model.pt", weights_only=True) for folder in folders]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
