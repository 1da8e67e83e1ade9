"""Runs of the entry script by the dozen: torch is imported once, then every run is a fork of that clean process.

    python -m tests.helpers.forked < cases.json > results.json

A case has ``argv``, ``env``, ``cwd`` and ``world`` (processes; more than one get the launcher's environment).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.helpers.runs import ROOT, SCRIPT, free_port

LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """One run of the script."""

    argv: list[str]
    cwd: str
    world: int = 1
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Exit status of the first process to end, what all wrote to stderr until then, and whether they had to be killed."""

    code: int
    stdout: str
    stderr: str
    hung: bool


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """Run ``cases``, one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.forked"],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=60 + LIMIT_SECONDS * len(cases),
    )
    assert done.returncode == 0, done.stderr
    return [Result(**values) for values in json.loads(done.stdout)]


def _serve() -> None:
    import tinytron.cli.entry
    import tinytron.training  # noqa: F401

    print(json.dumps([asdict(_run(Case(**values))) for values in json.load(sys.stdin)]))


def _run(case: Case) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        port = free_port()
        pids = [_fork(case, rank, port, out, err) for rank in range(case.world)]
        code, hung = _wait_for_first(pids)
        return Result(code, out.read_text(), err.read_text(), hung)


def _fork(case: Case, rank: int, port: int, out: Path, err: Path) -> int:
    if pid := os.fork():
        return pid
    code = 0
    try:
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.chdir(case.cwd)
        if case.world > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
        os.environ.update(case.env)
        sys.argv = [str(SCRIPT), *case.argv]
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_first(pids: list[int]) -> tuple[int, bool]:
    """Like a launcher: a failure ends the others; success is waited for."""
    deadline, left, code = time.monotonic() + LIMIT_SECONDS, list(pids), 0
    while left and code == 0 and time.monotonic() < deadline:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    hung = bool(left) and code == 0
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code, hung


if __name__ == "__main__":
    _serve()
