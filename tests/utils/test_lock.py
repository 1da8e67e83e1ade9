"""Locks on folders: refused or waited for, and gone with the process that held them."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tinytron.errors import ConfigError
from tinytron.utils.lock import lock_folder, wait_for_lock


def _hold(folder: Path, seconds: float) -> None:
    with wait_for_lock(folder / "a.lock", print), lock_folder(folder, "never shown"):
        (folder / "held").touch()
        time.sleep(seconds)
        (folder / "done").touch()


def _holder(folder: Path, seconds: float) -> Any:
    """A process that holds both locks of ``folder``."""
    process = mp.get_context("fork").Process(target=_hold, args=(folder, seconds))
    process.start()
    while not (folder / "held").exists():
        time.sleep(0.01)
    return process


def test_waiting_for_a_lock_takes_turns(tmp_path: Path) -> None:
    process, said = _holder(tmp_path, 0.3), list[str]()
    with wait_for_lock(tmp_path / "a.lock", said.append):
        assert (tmp_path / "done").exists()
    assert said == [f"waiting for another process that prepares {tmp_path}"]
    process.join()
    with wait_for_lock(tmp_path / "a.lock", said.append):
        assert len(said) == 1


def test_a_run_folder_is_refused_by_the_name_of_its_holder_until_that_dies(tmp_path: Path) -> None:
    process = _holder(tmp_path, 60)
    with pytest.raises(ConfigError, match=f"{tmp_path} is in use by process {process.pid} on .*; wait for it"):
        lock_folder(tmp_path, "wait for it")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock_folder(tmp_path, "wait for it").close()
    said: list[str] = []
    with wait_for_lock(tmp_path / "a.lock", said.append):
        assert not said


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_folder(tmp_path, "never shown").close()
    with pytest.raises(OSError, match="No locks available"), wait_for_lock(tmp_path / "a.lock", print):
        pass
