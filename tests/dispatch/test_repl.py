"""``tinytron repl``: a stand-in for Jupyter on a host, reached here and through a real ssh tunnel."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.dispatch.conftest import Place
from tests.dispatch.test_sshd import Server, Watcher
from tests.dispatch.test_sshd import server as server
from tests.dispatch.test_submit import Said, _until, _write
from tests.dispatch.test_submit import said as said
from tests.helpers.runs import ROOT, descendants, free_port
from tinytron.dispatch.record import read_all


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as page:
        content: bytes = page.read()
        return content


def _start(*words: object) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address that it prints."""
    command = [sys.executable, "-m", "tinytron", "repl", "-n", "0", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"Jupyter: (\S+)", line):
            return process, found[1]
    raise AssertionError(process.communicate())


def test_a_notebook_through_a_tunnel_that_comes_back(server: Server, place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain", "ssh": "box", "env": {"HOME": str(place.home)}}})
    port = free_port()
    process, url = _start("--port", port)
    try:
        assert url.startswith(f"http://127.0.0.1:{port}/lab?token=")
        assert _read(url) == b"a notebook"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            _read(url[:-3])
        token = url.partition("token=")[2]
        watcher = Watcher(token)
        time.sleep(0.5)
        assert watcher.stop() == []
        (tunnel,) = process_children(process.pid)
        os.kill(tunnel, signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(urllib.error.URLError):
            _read(url)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                assert _read(url) == b"a notebook"
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        else:
            raise AssertionError("the tunnel did not come back")
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped Jupyter on box" in out
    _until(said, "repl", "cancelled")
    for path in place.home.rglob("*"):
        if path.is_file() and path.name != "called.json":
            assert token.encode() not in path.read_bytes(), path


def process_children(pid: int) -> list[int]:
    """The ssh tunnels of a process: its descendants with -N."""
    found = []
    for child in descendants(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if b"-N" in words:
            found.append(child)
    return found


def test_a_notebook_on_this_machine_that_ends(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain"}})
    process, url = _start()
    assert _read(url) == b"a notebook"
    os.kill(int(read_all()[-1].id), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Jupyter has ended" in out


def test_without_jupyter_is_one_line(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain", "env": {"ACT": "no jupyter"}}})
    status, _, err = said("repl", "-n", "0", "--port", free_port())
    assert status == 2
    assert err == "error: Jupyter did not start on box; see tinytron logs general/default/repl\n"
    log = Path(read_all()[-1].log).read_text()
    assert "error: jupyterlab is not installed for" in log


def test_a_port_is_checked_first(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain"}})
    assert said("repl", "--port", 0)[2] == "error: --port 0 must be in 1..65535; use 8888\n"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        says = f"error: --port {port} is in use on this machine; use another one, such as {port + 1}\n"
        assert said("repl", "--port", port)[2] == says
    assert read_all() == []


def test_a_start_that_takes_too_long_is_cancelled(place: Place, said: Said) -> None:
    place.tool("nvidia-smi", "#!/bin/sh\necho '0, 9000'\n")
    _write(place, {"box": {"type": "plain", "chips": {"h100": 1}}})
    _, out, err = said("repl", "-n", "1", "--target", "box", "--port", free_port(), "--startup_timeout", "1")
    assert "Jupyter did not start on box within 1 s (waiting); use a longer --startup_timeout" in err
    assert "stopped Jupyter on box" in out
