"""Locks on folders: refused or waited for, and gone with the process that held them."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT
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
    assert said == [f"waiting for another process that is preparing {tmp_path}"]
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


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from tinytron.errors import TinytronError
from tinytron.utils.lock import lock_folder, wait_for_lock
os.seteuid(65534)
try:
    if sys.argv[2:]:
        with wait_for_lock(Path(sys.argv[1]) / ".lock", lambda line: print(line, flush=True)):
            print("my turn")
    else:
        lock_folder(Path(sys.argv[1]), "wait for it")
        print("locked")
except TinytronError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be two users")
def test_a_colleagues_free_lock_is_no_obstacle(tmp_path: Path) -> None:
    def other() -> str:
        command = [sys.executable, "-c", AS_ANOTHER_USER, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    for folder in (tmp_path, *tmp_path.parents):
        if "pytest-of-" in str(folder):
            folder.chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    lock_folder(tmp_path / "run", "wait for it").close()
    assert (tmp_path / "run" / ".lock").stat().st_mode & 0o777 == 0o666
    assert other() == "locked"
    (tmp_path / "run" / ".lock").chmod(0o644)  # as earlier versions made it
    (tmp_path / "run").chmod(0o755)
    assert "cannot be written; ask its owner, root" in other()
    (tmp_path / "run").chmod(0o777)
    with lock_folder(tmp_path / "run", "wait for it"):
        (tmp_path / "run" / ".lock").chmod(0o644)
        assert "in use by" in other()
        command = [sys.executable, "-c", AS_ANOTHER_USER, str(tmp_path / "run"), "waits"]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == f"waiting for another process that is preparing {tmp_path / 'run'}\n"
    assert waiting.communicate(timeout=60)[0] == "my turn\n"
    (tmp_path / "run" / ".lock").chmod(0o644)
    assert other() == "locked"
    (tmp_path / "run" / ".lock").unlink()
    os.chown(tmp_path / "run", 54321, -1)  # nobody's here
    (tmp_path / "run").chmod(0o755)
    assert "cannot be written; ask its owner, user 54321, or use another --exp_name" in other()
