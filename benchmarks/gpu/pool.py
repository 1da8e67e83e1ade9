"""The processes of the parts: started, watched, stopped; and the verdicts that they leave behind."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpu.forked import Forked, end_with_the_parent
from gpu.parts import Part

VERDICT = "verdict.json"
WORKING = ".working"  # what a part writes before it has a verdict
MARK = "TINYTRON_GPU_PART"  # names a part's folder in the environment of all of its processes
LEFT_OUT_STATUS = 75  # exit status of a part that cannot run here, for lack of a package
_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


class Verdict(str, enum.Enum):
    """How a part ended. Parts that this call had no time for get none, and are repeated by the next one, as are those that
    are left out for lack of a package."""

    DONE = "done"
    LEFT_OUT = "left out"
    FAILED = "failed"
    TIMED_OUT = "timed out"


VERDICT_OF_STATUS = {0: Verdict.DONE, LEFT_OUT_STATUS: Verdict.LEFT_OUT, None: Verdict.TIMED_OUT}  # others: failed


@dataclass
class Running:
    """A part at work in the process ``process``, until ``deadline``."""

    part: Part
    process: subprocess.Popen[bytes] | Forked
    log: IO[bytes]
    started: float
    deadline: float


class Pool:
    """Runs parts at the same time, as many as the cores allow, until ``end`` (of time.monotonic)."""

    def __init__(self, folder: Path, root: Path, rehearsing: bool, end: float) -> None:
        self._folder = folder
        self._root = root
        self._rehearsing = rehearsing
        self._end = end
        self._workers = max(1, min(4, (os.cpu_count() or 1) // (1 if rehearsing else 3)))
        self._running: list[Running] = []
        kill_marked(folder / WORKING)  # what a killed call has left behind
        shutil.rmtree(folder / WORKING, ignore_errors=True)

    def left(self) -> float:
        """Seconds that this call still has."""
        return self._end - time.monotonic()

    def start(self, part: Part) -> None:
        """Start ``part`` once there is room for it."""
        while len(self._running) >= self._workers:
            self._watch()
        if self.left() <= 0:
            return
        out = self._folder / WORKING / part.name
        out.mkdir(parents=True)
        log = open(out / "log.txt", "wb")  # noqa: SIM115  # closed when the part ends
        arguments = [*part.arguments, "--out", str(out), "--others", str(self._folder)]
        process: subprocess.Popen[bytes] | Forked
        if self._rehearsing:
            process = Forked(part.module, [*arguments, "--rehearse"], self._root, log, {MARK: str(out)})
        else:
            process = subprocess.Popen(
                [sys.executable, "-m", part.module, *arguments], cwd=self._root, env={**os.environ, MARK: str(out)},
                stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_the_parent,
            )  # fmt: skip
        now = time.monotonic()
        self._running.append(Running(part, process, log, now, min(now + part.limit, self._end)))
        print(f"{part.name}: {part.proves} (about {part.expected} s on an H100)", flush=True)

    def drain(self) -> None:
        """Wait for all parts that run."""
        while self._running:
            self._watch()

    def stop(self) -> None:
        """End all parts that run, without verdicts."""
        for running in self._running:
            self._finish(running)
        self._running.clear()

    def _watch(self) -> None:
        time.sleep(0.05)
        for running in list(self._running):
            code, now = running.process.poll(), time.monotonic()
            if code is None and now < running.deadline:
                continue
            self._running.remove(running)
            cut = code is None
            self._finish(running)  # and what it left behind
            if cut and running.deadline >= self._end:
                print(f"{running.part.name}: no time left; the next call repeats it", flush=True)
            else:
                self._publish(running, code, now - running.started)

    def _finish(self, running: Running) -> None:
        _end(running.process)
        kill_marked(self._folder / WORKING / running.part.name)
        running.log.close()

    def _publish(self, running: Running, code: int | None, seconds: float) -> None:
        """Move the part's folder to its place, with its verdict. ``code``: the exit status, ``None`` for a part that was
        stopped."""
        verdict = VERDICT_OF_STATUS.get(code, Verdict.FAILED)
        source, target = self._folder / WORKING / running.part.name, self._folder / running.part.name
        content = {
            "verdict": verdict.value,
            "exit_status": code,
            "seconds": round(seconds, 1),
            "code": revision(self._root),
        }
        write_json(source / VERDICT, content)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(source, target)
        print(f"{running.part.name}: {verdict.value} in {seconds:.0f} s", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(_GRACE_SECONDS)
        except (subprocess.TimeoutExpired, TimeoutError):
            continue


def kill_marked(place: Path) -> None:
    """End every process that works for a part in ``place`` or below it. Launchers give their workers sessions of their
    own, so the environment tells, which all of a part's processes inherit (Linux)."""
    mark = f"{MARK}={place}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            values = entry.read_bytes().split(b"\0")
            if any(value == mark or value.startswith(mark + b"/") for value in values):
                os.kill(int(entry.parent.name), signal.SIGKILL)


def revision(root: Path) -> str:
    """The commit of the code, with ``-dirty`` if files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """All or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def read_verdict(folder: Path, name: str) -> Verdict | None:
    """How the part ``name`` ended, if it did."""
    path = folder / name / VERDICT
    return Verdict(json.loads(path.read_text())["verdict"]) if path.exists() else None
