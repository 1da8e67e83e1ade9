"""Two runs on one folder: the second is refused, and a run that died holds nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers.runs import TINY, kill, run, run_well, start

FLAGS: tuple[object, ...] = (*TINY, "--max_steps", 100000, "--save_every_steps", 50, "--log_dir", "log")


def _started(cwd: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(cwd.glob("log/tiny_*/00050_meta.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(
    "flags",
    [pytest.param((), id="resume"), pytest.param(("--no-resume",), id="no_resume", marks=pytest.mark.slow)],
)
def test_a_second_run_on_one_folder_is_refused(tmp_path: Path, flags: tuple[object, ...]) -> None:
    first = start(*FLAGS, cwd=tmp_path, processes=0)
    try:
        _started(tmp_path)
        second = run(*FLAGS, *flags, cwd=tmp_path, processes=0)
        assert first.poll() is None, "the first run ended too early for this test"
    finally:
        kill(first)
        first.communicate()
    assert second.code == 2
    (folder,) = (tmp_path / "log").iterdir()  # nothing was moved
    expected = f"error: run folder log/{folder.name} is in use by process {first.pid} on "
    assert second.stderr.startswith(expected)
    assert second.stderr.endswith("; wait for it or stop it, or use another --exp_name\n")
    assert "resuming after step" in run_well(*FLAGS, "--max_steps", 60, cwd=tmp_path, processes=0).stdout
