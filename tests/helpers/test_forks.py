"""A fork of the server is the process that Python would have started."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import forks
from tests.helpers.runs import ROOT, descendants, run

pytestmark = pytest.mark.skipif(not forks.installed(), reason="programs are real processes here")

FORKED = "import sys; forked = 'torch' in sys.modules\n"
LOOK = """
import json, os, pathlib, signal
mine = lambda name: pathlib.Path("/proc/self", name)
streams = (sys.stdin, sys.stdout, sys.stderr)
parts = lambda s: [type(s.buffer).__name__, s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through]
seen = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "cwd": os.getcwd(), "env": dict(os.environ),
    "from C": mine("cmdline").read_text().rstrip("\\0"), "file": __file__, "name": __name__, "doc": __doc__,
    "main": sys.modules["__main__"].__dict__ is globals(), "builtins": __builtins__.__name__, "parent": os.getppid(),
    "files": sorted(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
    "streams": [parts(s) for s in streams], "same": [s is t for s, t in zip(streams, (sys.__stdin__, sys.__stdout__))],
    "handlers": {s: str(signal.getsignal(s)) for s in signal.valid_signals()},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "umask": os.umask(0o22), "read": sys.stdin.read(),
    "leads": (os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()),
}
print(json.dumps([forked, seen]))
"""


def _script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(FORKED + text)
    return str(path)


def _both(command: list[str], **options: Any) -> Any:
    """The things that ``command`` finds as a fork. A real process must find the same."""
    printed = []
    for real in (False, True):
        with forks.real_processes() if real else contextlib.nullcontext():
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
        assert (done.returncode, done.stderr) == (0, "")
        forked, seen = json.loads(done.stdout)
        assert forked is not real
        printed.append(seen)
    fork, real = printed
    assert {name: (fork[name], real[name]) for name in fork if fork[name] != real[name]} == {}
    return fork


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_program_finds_what_python_gives_it(tmp_path: Path, unbuffered: bool) -> None:
    _script(tmp_path, LOOK)
    command = [sys.executable, *(["-u"] if unbuffered else []), "script.py", "--a b", "", "é\n", "'\""]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:.", "NEW": "1=2 \udcff"}
    env.pop("HOME", None)
    fork = _both(command, cwd=tmp_path, env=env, input="of stdin\n", start_new_session=unbuffered)
    assert fork["parent"] == os.getpid()
    assert fork["env"]["NEW"] == "1=2 \udcff"
    assert "HOME" not in fork["env"]


def test_stop_signals_that_are_ignored_here_are_ignored_there(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _both([sys.executable, _script(tmp_path, LOOK)], stdin=subprocess.DEVNULL, env=dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)


ENDS = {
    "": (0, ""),
    "sys.exit(3)": (3, ""),
    "sys.exit('a text')": (1, "a text"),
    "import os; os._exit(4)": (4, ""),
    "raise ValueError('no good')": (1, "ValueError: no good"),
    "def (": (1, "SyntaxError: invalid syntax"),
    "raise KeyboardInterrupt": (-signal.SIGINT, "KeyboardInterrupt"),
    "import os; os.kill(os.getpid(), 9)": (-signal.SIGKILL, ""),
    "import atexit, os; atexit.register(os._exit, 5)": (5, ""),
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('done', file=sys.stderr))).start()": (
        *(0, "done"),
    ),
}


@pytest.mark.parametrize("text", ENDS)
def test_it_ends_as_under_python(tmp_path: Path, text: str) -> None:
    code, last = ENDS[text]
    done = subprocess.run([sys.executable, _script(tmp_path, f"print(forked)\nsys.stdout.flush()\n{text}")],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, (done.stderr.splitlines() or [""])[-1]) == (code, last)
    assert done.stdout == ("" if text == "def (" else "True\n")


def test_errors_and_output_go_where_they_are_sent(tmp_path: Path) -> None:
    script = _script(tmp_path, "print(1, flush=True); print(2, file=sys.stderr, flush=True); print(3, 'x' * 100_000)")
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, script], stdout=out, stderr=subprocess.STDOUT, check=True)
    assert (tmp_path / "out").read_text() == "1\n2\n3 " + "x" * 100_000 + "\n"


def test_signals_reach_it_from_its_first_moment_on(tmp_path: Path) -> None:
    wait = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(6))\nprint(forked, flush=True)\n"
    wait += "time.sleep(60)"
    command = [sys.executable, _script(tmp_path, wait)]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as early:
            early.terminate()
            assert early.wait(timeout=30) == -signal.SIGTERM
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 6


def test_no_two_share_their_random_numbers(tmp_path: Path) -> None:
    names = "random.random()", "numpy.random.random()", "torch.rand(1).item()", "uuid.uuid4().hex", "tempfile.mktemp()"
    draw = f"import json, random, uuid, tempfile, numpy, torch\nprint(json.dumps([{', '.join(names)}]))"
    command = [sys.executable, _script(tmp_path, draw)]
    first, second = (json.loads(subprocess.check_output(command)) for _ in range(2))
    assert not set(first) & set(second)


def _forked(folder: Path, **options: Any) -> bool:
    done = subprocess.run([sys.executable, _script(folder, "print(forked)")], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout == "True\n"


@pytest.mark.parametrize(
    "env", [{"OMP_NUM_THREADS": "2"}, {"PYTHONHASHSEED": "0"}, {"TORCH_LOGS": "+all"}, {"LANG": "C"}]
)
def test_variables_that_are_read_at_the_start_make_it_real(tmp_path: Path, env: dict[str, str]) -> None:
    assert _forked(tmp_path)
    assert not _forked(tmp_path, env={**os.environ, **env})


def test_a_variable_that_importing_torch_sets_does_not(tmp_path: Path) -> None:
    importlib.import_module("torch._dynamo")
    assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert _forked(tmp_path)


@pytest.mark.parametrize("name", ["random.py", "sitecustomize.py", "tinytron/__init__.py"])
def test_modules_of_its_own_make_it_real(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert not _forked(tmp_path)


def test_a_test_can_ask_for_a_real_process(tmp_path: Path, real_processes: None) -> None:
    assert not _forked(tmp_path)


def test_nothing_is_left(tmp_path: Path) -> None:
    assert _forked(tmp_path)  # the server runs

    def have() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(descendants(os.getpid()))

    before = have()
    for _ in range(3):
        assert _forked(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, _script(tmp_path, "import time; time.sleep(60)")], timeout=0.5)
        subprocess.run([sys.executable, "-m", "tinytron", "--version"], check=True)
    assert have() == before


WORKER = "import os, time\nprint(forked, os.getppid(), flush=True)\nif sys.argv[1:]: time.sleep(60)"


def test_workers_are_children_of_their_launcher(tmp_path: Path) -> None:
    done = run(cwd=tmp_path, processes=2, script=Path(_script(tmp_path, WORKER)))
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert lines[0].startswith("True ")
    assert str(os.getpid()) not in lines[0]


def test_the_server_of_a_launcher_ends_with_it(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "tinytron.cli.launch", "--standalone", "--nproc_per_node", "1"]
    process = subprocess.Popen([*launch, _script(tmp_path, WORKER), "wait"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == f"True {process.pid}\n".encode()
    below = descendants(process.pid)
    words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below]
    (worker,) = (pid for pid, text in zip(below, words, strict=True) if b"script.py" in text)
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGKILL)
    process.stdout.close()
    deadline = time.monotonic() + 30
    while any(_lives(pid) for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
