"""A real sshd on loopback, with keys and a port of its own: a job outlives every connection, and no secret is seen."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dispatch.conftest import Place
from tests.dispatch.test_submit import TOKEN, Said, _until, _write
from tests.dispatch.test_submit import said as said
from tinytron.dispatch.record import read_all

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


class Server:
    """An sshd that only this test's key can use."""

    def __init__(self, folder: Path, place: Place) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.folder = folder
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        )
        (folder / "ssh_config").write_text(
            f"Host box\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
            "  StrictHostKeyChecking accept-new\n"
        )
        ssh = shutil.which("ssh")
        place.tool("ssh", f'#!/bin/sh\nexec {ssh} -F {folder}/ssh_config "$@"\n')
        self.start()

    def start(self) -> None:
        """Start, and wait until it listens."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", f"{self.folder}/sshd_config"], stderr=log)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if self.process.poll() is not None:
                pytest.skip(f"sshd does not start here: {(self.folder / 'log').read_text()}")
            time.sleep(0.1)
        raise AssertionError("sshd does not listen")

    def stop(self) -> None:
        """Stop it and all its connections."""
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def server(place: Place, tmp_path: Path) -> Iterator[Server]:
    if SSHD is None:
        pytest.skip("sshd is not installed (Debian: apt-get install openssh-server)")
    folder = tmp_path / "ssh"
    folder.mkdir()
    empty = Path("/run/sshd")  # sshd needs this folder when root starts it
    made = os.geteuid() == 0 and not empty.exists()
    if made:
        empty.mkdir(mode=0o755)
    try:
        found = Server(folder, place)
        yield found
        found.stop()
    finally:
        if made:
            empty.rmdir()


class Watcher(threading.Thread):
    """Looks for a word in the command lines of all processes until it is stopped."""

    def __init__(self, word: str) -> None:
        super().__init__(daemon=True)
        self.word, self.found, self.looks, self._end = word.encode(), [""], 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._end.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    text = path.read_bytes()
                    if self.word in text and self.word != b"":
                        self.found.append(text.decode("utf-8", "replace"))
            self.looks += 1

    def stop(self) -> list[str]:
        """The command lines that had the word."""
        self._end.set()
        self.join()
        return self.found[1:]


def test_a_job_outlives_the_connection_and_keeps_log_and_status(
    server: Server, place: Place, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)
    _write(
        place,
        {"box": {"type": "plain", "ssh": "box", "env": {"ACT": "wait", "HOME": str(place.home)}}},
        wandb={"env": "MY_KEY"},
    )
    watcher = Watcher(TOKEN)
    status, out, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")
    assert (status, err) == (0, "")
    _until(said, "mine", "running")
    while not (place.home / "called.json").exists():
        time.sleep(0.1)
    assert place.called["env"]["WANDB_API_KEY"] == TOKEN
    assert "SSH_CONNECTION" in place.called["env"]
    here = Path(read_all()[-1].here)
    assert oct((here / "secret.WANDB_API_KEY").stat().st_mode)[-3:] == "600"
    assert oct(here.stat().st_mode)[-3:] == "700"
    server.stop()
    pid = int(read_all()[-1].id)
    assert Path(f"/proc/{pid}").exists()
    assert os.getsid(pid) == pid  # in no session of ours
    status, out, err = said("status", "mine")
    assert status == 1
    assert "error: box cannot be reached" in out
    server.start()
    _until(said, "mine", "running")
    assert said("cancel", "mine")[0] == 0
    _until(said, "mine", "cancelled (0)")
    assert watcher.stop() == []
    assert watcher.looks > 3
    assert not (here / "secret.WANDB_API_KEY").exists()
    for folder in (place.home / "scratch", place.home / "root", place.home / ".tinytron"):
        for path in folder.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path
    run = place.home / "root/checkpoints/general/default/mine"
    run.mkdir(parents=True)
    (run / "a b").write_text("x" * 100_000)
    assert said("pull", "mine", "--out", "here")[0] == 0
    assert (Path("here/checkpoints/general/default/mine") / "a b").stat().st_size == 100_000


def test_the_watcher_sees_a_word(tmp_path: Path) -> None:
    watcher = Watcher("a-word-to-find")
    with subprocess.Popen(["sh", "-c", "sleep 1; : a-word-to-find"]):
        time.sleep(0.8)
    assert watcher.stop()


def test_the_login_of_another_user_is_refused_in_one_line(server: Server, place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain", "ssh": "nobody@box"}})
    _, _, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0", "--target", "box")
    assert err.startswith("error: nobody@box cannot be reached (")
    assert len(err.splitlines()) == 1
