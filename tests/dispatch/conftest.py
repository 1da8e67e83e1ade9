"""A laptop and hosts in one temporary folder: a repository, settings, and a Python that records how it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinytron.dispatch.hosts import Files
from tinytron.dispatch.script import packed
from tinytron.dispatch.settings import Cluster

# A stand-in for the Python of a host: it writes its arguments and environment to $HOME/called.json and does $ACT.
PYTHON = f"""#!{sys.executable}
import json, os, signal, sys, time
def leave(number, frame):
    with open(os.environ["HOME"] + "/signals", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    sys.exit(0)
if sys.argv[1] == "-c":
    if "jupyterlab" in sys.argv[2]:
        sys.exit(os.environ.get("ACT") == "no jupyter")
    exec(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGUSR1, leave)
path = os.environ["HOME"] + "/called.json"
part = f"{{path}}.{{os.getpid()}}"  # two jobs may start at once
with open(part, "w") as file:
    json.dump({{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}, file)
os.rename(part, path)
print("the job speaks", flush=True)
act = os.environ.get("ACT", "")
if "jupyter" in sys.argv:
    import http.server
    class Answer(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass
        def do_GET(self):
            known = self.path == "/lab?token=" + os.environ["JUPYTER_TOKEN"]
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(b"a notebook")
    words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
    http.server.HTTPServer((words["ip"], int(words["port"])), Answer).serve_forever()
if act.isdecimal():
    sys.exit(int(act))
if act == "write":
    with open(sys.argv[6] + "/written", "w") as file:
        file.write("by a job")
if act == "wait":
    time.sleep(60)
"""


@dataclass
class Place:
    """The folders of a test: ``home`` is the home of laptop and hosts."""

    home: Path
    python: Path

    @property
    def called(self) -> dict[str, Any]:
        """How the recording Python was called last."""
        found: dict[str, Any] = json.loads((self.home / "called.json").read_text())
        return found

    def tool(self, name: str, text: str) -> None:
        """Put a program on the PATH."""
        path = self.home / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def cluster(self, **more: Any) -> Cluster:
        """A cluster in the home folder."""
        folders = {"root": str(self.home / "root"), "work": str(self.home / "scratch")}
        return Cluster(**{**folders, "python": str(self.python), **more})


def without_tool(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Leave the folders that have the program ``name`` out of the PATH."""
    folders = os.environ["PATH"].split(":")
    monkeypatch.setenv("PATH", ":".join(one for one in folders if not Path(one, name).exists()))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    home = tmp_path / "a home"
    (home / "bin").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    for name in ("NUM_NODES", "NODE_RANK", "ACT", "NUM_GPUS"):
        monkeypatch.delenv(name, raising=False)
    python = home / "bin" / "recording python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return Place(home, python)


@pytest.fixture
def repository(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, which is the working directory."""
    folder = place.home / "repository"
    folder.mkdir()
    (folder / "code.py").write_text("first\n")
    (folder / ".gitignore").write_text("ignored/\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        git(folder, *words)
    monkeypatch.chdir(folder)
    return folder


def git(folder: Path, *words: str) -> str:
    """Run git in ``folder``, without the user's settings."""
    who = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", *who, *words], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def code() -> Files:
    """A shipment of one file."""
    return Files("a1b2", packed({"code.py": (b"first\n", 0o644)}))
