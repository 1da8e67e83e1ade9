"""Our launcher: torchrun's agents and environment, exit statuses passed on, nothing printed of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import HashStore

from tests.helpers.runs import ROOT, run
from tinytron.cli.launch import keep_the_store

SHOW = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
shown = json.dumps({"env": {n: os.environ[n] for n in names}, "argv": sys.argv[1:]})
os.write(1, (shown + "\\n").encode())  # in one piece: the other worker writes to the same pipe
"""
FAIL = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("rank 1 says why", file=sys.stderr, flush=True)
    sys.exit(7) if sys.argv[1] == "exit" else os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def _script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_workers_get_torchruns_environment_and_the_scripts_arguments(tmp_path: Path) -> None:
    script = _script(tmp_path, SHOW)
    finished = run("--flag", "value", cwd=tmp_path, processes=2, script=script, env={"OMP_NUM_THREADS": None})
    assert (finished.code, finished.stderr) == (0, "")
    shown = [json.loads(line) for line in finished.stdout.splitlines()]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank, worker in enumerate(sorted(shown, key=lambda w: str(w["env"]["RANK"]))):
        assert worker["argv"] == ["--flag", "value"]
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": threads}
        assert worker["env"] == names


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [("exit", 7, ""), ("kill", 128 + 9, "error: process 1 was killed by SIGKILL (out of memory?)\n")],
    ids=["exit", "kill"],
)
def test_a_failed_workers_status_is_passed_on_and_the_others_are_stopped(
    tmp_path: Path, how: str, status: int, says: str
) -> None:
    finished = run(how, cwd=tmp_path, processes=2, script=_script(tmp_path, FAIL))
    assert finished.code == status
    assert finished.stderr == "rank 1 says why\n" + says


USER_ERROR = """
from tinytron.cli import entry
from tinytron.errors import ConfigError


def fail():
    raise ConfigError("--x 3 is too large; use 2")


entry.run(fail)
"""


def test_torchrun_ends_with_what_went_wrong(tmp_path: Path) -> None:
    script = _script(tmp_path, USER_ERROR)
    finished = run(cwd=tmp_path, processes=2, script=script, launcher="torch.distributed.run")
    assert re.search(r"traceback : error: --x 3 is too large; use 2\n=+\n*$", finished.stderr)


@pytest.mark.parametrize("module", [("tinytron", "launch"), ("tinytron.cli.launch",)])
def test_an_option_that_torchrun_refuses_is_one_line(tmp_path: Path, module: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", *module, "--nproc_per_node", "many", "pretrain_debug.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Unsupported nproc_per_node value: many; see --help\n"


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "tinytron",
            "launch",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(port),
            "pretrain_debug.py",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --master_port {port} (MASTER_PORT) is in use by another program; use")


@pytest.mark.parametrize(("flags", "text"), [
    (("--master_port", "0"), "--master_port 0 (MASTER_PORT) must be in 1..65535; use 29500, or on one node --standalone"),
    (("--master_port", "70000"), "--master_port 70000 (MASTER_PORT) must be in 1..65535; use 29500"),
    (("--master_addr", "no-such-node.invalid"), "the host name no-such-node.invalid (--master_addr, MASTER_ADDR) has"),
    (("--rdzv_backend", "c10d", "--rdzv_endpoint", "no-such-node.invalid:29400"),
     "the host name no-such-node.invalid (--rdzv_endpoint) has no address ("),
    (("--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:many"), "--rdzv_endpoint node0:many must be HOST:PORT; use"),
    (("--master_addr", "a..b"), "the host name a..b (--master_addr, MASTER_ADDR) has no address ("),
])  # fmt: skip
def test_a_place_where_nobody_can_meet_is_one_line(flags: tuple[str, ...], text: str) -> None:
    command = [sys.executable, "-m", "tinytron", "launch", "--nproc_per_node", "2", *flags, "pretrain_debug.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {text}")


def test_a_missing_script_is_one_line(tmp_path: Path) -> None:
    finished = run(cwd=tmp_path, processes=2, script=tmp_path / "nofile.py")
    says = f"error: {tmp_path}/nofile.py does not exist; give a script, or -m and a module such as -m tinytron\n"
    assert (finished.code, finished.stderr) == (2, says)


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("nodes", [{}, {"PET_NNODES": "1:2"}], ids=["one node", "a range"])
def test_a_scripts_help_is_printed_once(tmp_path: Path, flag: str, nodes: dict[str, str]) -> None:
    script = _script(tmp_path, "import sys; print('help', sys.argv[1:])")
    finished = run(flag, cwd=tmp_path, processes=2, script=script, env=nodes)
    assert (finished.code, finished.stdout) == (0, f"help ['{flag}']\n")


def test_one_node_cannot_be_several(tmp_path: Path) -> None:
    """torchrun would wait for a second node at a place that it cannot know."""
    finished = run(cwd=tmp_path, processes=2, script=_script(tmp_path, SHOW), env={"PET_NNODES": "2"})
    assert finished.code == 2
    assert finished.stderr == (
        "error: --standalone starts the processes of one node, but --nnodes (PET_NNODES) is 2; use --nnodes 1, or leave "
        "--standalone out\n"
    )


def test_the_first_node_keeps_the_store_until_the_others_have_left() -> None:
    store = HashStore()
    passed = threading.Barrier(2)
    left: list[int] = []

    def wait_for_all(agent: Any) -> None:
        passed.wait()
        if agent._worker_group.group_rank == 1:
            time.sleep(0.3)  # still reading
            left.append(1)

    def leave(rank: int) -> None:
        group = SimpleNamespace(group_rank=rank, group_world_size=2)
        keep_the_store(wait_for_all)(cast(Any, SimpleNamespace(_worker_group=group, _store=store)))
        left.append(-rank)

    others = threading.Thread(target=leave, args=(1,))
    others.start()
    leave(0)
    others.join()
    assert left.index(1) < left.index(0)
