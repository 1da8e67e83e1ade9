"""Waiting for the name of the node where all processes meet, and the end of a worker whose launcher is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT
from tinytron.errors import ConfigError
from tinytron.utils import launcher


def test_the_name_of_a_node_that_starts_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[str] = []

    def late(host: str, port: Any) -> list[Any]:
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", late)
    launcher.await_name("node-0", seconds=60, every=0.01)
    assert tries == ["node-0"] * 3
    assert capsys.readouterr().err == "node-0 (--master_addr, MASTER_ADDR) has no address yet; trying for 60 s\n"


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_a_name_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    def never(host: str, port: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    text = r"node-0 \(--master_addr, MASTER_ADDR\) has no address \(.*not known\); use the name or IP"
    with pytest.raises(ConfigError, match=text):
        launcher.await_name("node-0", seconds=seconds, every=0.01)


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_cannot_be_is_an_error(port: int) -> None:
    with pytest.raises(ConfigError, match=rf"--master_port {port} \(MASTER_PORT\) must be in 1\.\.65535; use 29500"):
        launcher.check_meeting_place("localhost", port, several=False)
    for works in (1, 65535, None):
        launcher.check_meeting_place("[::1]", works, several=False)


def test_names_and_addresses_of_this_machine_are_known_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        launcher.await_name(host, seconds=0)
    assert capsys.readouterr().err == ""


WORKER = """
import os, signal, sys, time
from tinytron.utils.launcher import stop_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (open("told", "w").close(), sys.exit()))
if sys.argv[1] == "late":
    while os.getppid() == int(os.environ["TINYTRON_LAUNCHER"]):
        time.sleep(0.01)
stop_with_launcher(os.environ)
assert "TINYTRON_LAUNCHER" not in os.environ
open("ready", "w").close()
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
os.environ["TINYTRON_LAUNCHER"] = str(os.getpid())
print(subprocess.Popen([sys.executable, "worker.py", sys.argv[1]]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent died")
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_worker_gets_sigterm_when_its_launcher_is_killed(when: str, tmp_path: Path) -> None:
    """Also one that asks for it after its launcher has died."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, when]
    parent = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    end = time.monotonic() + 60
    while when == "early" and not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    parent.communicate()
    while not (tmp_path / "told").exists():
        if time.monotonic() > end:
            os.kill(worker, signal.SIGKILL)
            raise AssertionError("the worker was not told")
        time.sleep(0.01)


def test_a_process_that_no_launcher_started_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "kill", None)
    launcher.stop_with_launcher({})
    launcher.stop_with_launcher({launcher.LAUNCHER: str(os.getpid())})  # a shell is between the two
