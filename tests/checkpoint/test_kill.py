"""P9 with real processes: SIGKILL at any moment, start again, and the log is that of a run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import TINY, descendants, kill, losses, run_well, start
from tinytron.checkpoint import newest_checkpoint

FLAGS: tuple[object, ...] = (
    *TINY,
    *("--mock_data_num_samples", 200, "--do_val", "--val_every_steps", 7, "--save_every_steps", 3),
    *("--log_every", 4, "--log_dir", "log", "--keep_last", 2),
)
BF16 = ("--precision", "bf16", "--dropout", 0.1)
EXPERTS = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8, "--ep_size", 2),
    *("--optimizer", "muon"),
)
SLOW = pytest.mark.slow


def _folder(cwd: Path) -> Path | None:
    return next(iter((cwd / "log").glob("tiny_*")), None)


def _newest(cwd: Path) -> int:
    folder = _folder(cwd)
    newest = newest_checkpoint(folder) if folder else None
    return newest.step if newest else 0


def _saving(cwd: Path) -> bool:
    """Whether parts of a checkpoint lie there without its metadata."""
    folder = _folder(cwd)
    names = {path.name for path in folder.iterdir()} if folder else set()
    return any(name.endswith("_opt") and name.replace("_opt", "_meta.pt") not in names for name in names)


def _worker(process: subprocess.Popen[str], moment: random.Random) -> int:
    """One of the launcher's workers."""
    workers = [pid for pid in descendants(process.pid) if "pretrain_debug" in Path(f"/proc/{pid}/cmdline").read_text()]
    return moment.choice(sorted(workers))


@pytest.mark.parametrize(
    ("processes", "flags", "steps", "kills", "when"),
    [
        pytest.param(0, (), 45, 2, "any", id="fp32"),
        pytest.param(0, BF16, 150, 16, "any", id="bf16_dropout", marks=SLOW),
        pytest.param(0, (), 150, 16, "saving", id="saving", marks=SLOW),
        pytest.param(2, BF16, 150, 8, "saving", id="two_ranks_saving", marks=SLOW),
        pytest.param(2, EXPERTS, 150, 12, "one_rank", id="one_of_two_ranks", marks=SLOW),
    ],
)
def test_killed_runs_end_as_unbroken_ones(
    tmp_path: Path, processes: int, flags: tuple[object, ...], steps: int, kills: int, when: str
) -> None:
    one, two = tmp_path / "unbroken", tmp_path / "killed"
    one.mkdir()
    two.mkdir()
    flags = (*FLAGS, *flags, "--max_steps", steps)
    run_well(*flags, cwd=one, processes=processes)
    moment, reached = random.Random(kills), []
    for _ in range(kills):
        process = start(*flags, cwd=two, processes=processes)
        before, deadline = _newest(two), time.monotonic() + 60
        while _newest(two) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if when == "saving":
            while not _saving(two) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(moment.uniform(0, 0.02))
        else:
            time.sleep(moment.uniform(0, 0.1))  # in a step, in a save, in a validation
        if when == "one_rank" and process.poll() is None:
            os.kill(_worker(process, moment), signal.SIGKILL)
            assert process.wait(60) != 0, "the launcher did not notice"
        else:
            kill(process)
        process.communicate()
        reached.append(_newest(two))
    assert 0 < reached[0] < steps, f"the first kill came too early or too late: checkpoints {reached}"
    finished = run_well(*flags, cwd=two, processes=processes)
    print(f"{kills} kills at checkpoints {reached}")
    folders = [folder for cwd in (one, two) if (folder := _folder(cwd))]
    logs = [(folder / "log.txt").read_bytes() for folder in folders]
    assert logs[1] == logs[0], f"killed at checkpoints {reached}\n{finished.stdout}"
    assert list(losses(logs[0].decode())) == list(range(1, steps + 1))
    weights = [torch.load(folder / f"{steps:05d}_model.pt", weights_only=True) for folder in folders]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
