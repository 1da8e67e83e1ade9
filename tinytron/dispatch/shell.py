"""Bash on a host, by ssh or here: scripts and data travel over standard input, so that no command line shows them."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO

from tinytron.errors import HostError

CONNECT_SECONDS = 15
SECONDS = 120.0
_SSH_FAILED = 255
_FAREWELLS = (
    "tar: Exiting with",
    "tar: Error is not recoverable",
    "tar: Child returned",
)  # the reason comes before them


class NoAnswerError(HostError):
    """The host did not answer in time; what it was asked to do may have been done."""


@dataclass(frozen=True)
class Shell:
    """The machine ``ssh`` (``None``: this one), reached through the jump host ``proxy`` if there is one."""

    ssh: str | None = None
    proxy: str | None = None

    @property
    def place(self) -> str:
        """The machine, for messages."""
        return self.ssh or "this machine"

    def command(self, *options: str) -> list[str]:
        """The command that starts bash there. Its arguments are the same for every script, whatever shell the user has."""
        if self.ssh is None:
            return ["bash", "-s"]
        jump = ["-J", self.proxy] if self.proxy else []
        usual = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        return ["ssh", *usual, *jump, *options, "--", self.ssh, "bash -s"]

    def run(self, script: str, data: bytes = b"", seconds: float = SECONDS) -> str:
        """The output of ``script`` as text; ``data`` is its standard input. Raises: HostError if the host cannot be
        reached, if the script fails, with the last line of its errors, and if it takes longer than ``seconds``."""
        with tempfile.TemporaryFile() as file:
            self.run_into(file, script, data, seconds)
            return file.read().decode("utf-8", "replace")

    def run_into(self, file: IO[bytes], script: str, data: bytes = b"", seconds: float = SECONDS) -> None:
        """As ``run``, with the output in ``file``, whose position is then the output's beginning: a host may print lines
        of its own before it, when it reads the user's ``.bashrc``."""
        mark = secrets.token_hex(16).encode()
        try:
            done = subprocess.run(
                self.command(),
                input=_wrapped(f"echo {mark.decode()}\n{script}", data),
                stdout=file,
                stderr=subprocess.PIPE,
                timeout=seconds,
                check=False,
            )
        except FileNotFoundError as error:
            raise HostError(f"{error.filename} is not installed here; install OpenSSH's client") from error
        except subprocess.TimeoutExpired as error:
            raise NoAnswerError(
                f"{self.place} does not answer within {seconds:g} s"
                + (f"; check it with ssh {self.ssh}" if self.ssh else "")
            ) from error
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            told = [line for line in lines if not line.startswith(_FAREWELLS)] or lines
            last = told[-1] if told else f"exit status {done.returncode}"
            if self.ssh is not None and done.returncode == _SSH_FAILED:
                raise NoAnswerError(
                    f"{self.ssh} cannot be reached ({last}); make `ssh {self.ssh} true` work without a password"
                )
            raise HostError(f"{self.place}: {last}")
        file.seek(0)
        before = []
        for line in file:
            if line.rstrip(b"\r\n").endswith(mark):
                return
            before.append(line)
        said = b"".join(before)[:200].decode("utf-8", "replace").strip()
        raise HostError(f"{self.place} did not run bash, but said {said!r}; make its shell run `bash -s`")

    def tunnel(self, port: int, node: str, remote: int) -> subprocess.Popen[bytes]:
        """An ssh that forwards ``port`` of this machine to ``remote`` on ``node``, as seen from the host."""
        forward = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:{node}:{remote}"]
        return subprocess.Popen(self.command(*forward)[:-1], stdin=subprocess.DEVNULL)

    def follow(self, script: str) -> int:
        """Run ``script`` with our standard output. Returns its exit status."""
        process = subprocess.Popen(self.command("-T"), stdin=subprocess.PIPE)
        assert process.stdin is not None, "a pipe was asked for"
        with process.stdin as pipe:
            pipe.write(_wrapped(script, b""))
        try:
            return process.wait()
        finally:
            if process.poll() is None:  # Ctrl-C
                process.terminate()
                process.wait()


def _wrapped(script: str, data: bytes) -> bytes:
    """``script`` in braces: bash reads it to the end before it runs any of it, and then leaves ``data`` to the script's
    commands."""
    return b"{\nset -eu\n" + script.encode() + b"\nexit\n}\n" + data
