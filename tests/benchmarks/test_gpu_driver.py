"""benchmarks/gpu.sh: parts of made-up content are run, stopped, killed, repeated and reported; wrong calls are one line."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT

# A driver with parts of its own: `fake` writes a figure and a check, sleeps, and ends as it is told.
DRIVER = """
import sys
sys.path[:0] = [{here!r}, {benchmarks!r}, {root!r}]
from gpu import forked, parts, pool, run
from gpu.parts import Part
from tinytron.cli.entry import status_of
parts.PARTS = tuple(Part(*row) for row in {rows!r})
Part.limit = property(lambda part: part.expected)
forked.NEEDED = forked.PEERS = ()
sys.exit(status_of(run.main))
"""
FAKE = """
import argparse, json, os, subprocess, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("--out", "--others", "--kind"):
    parser.add_argument(name)
parser.add_argument("--rehearse", action="store_true")
args = parser.parse_args()
out = Path(args.out)
(out / "pid").write_text(str(os.getpid()))
figure = {"costs.host_waits": 0.0} if args.kind == "fast" else {}
problems = {"a check": "it is wrong" if args.kind == "wrong" else ""}
text = json.dumps({"figures": figure, "problems": problems, "notes": ["note of " + args.kind], "tables": []})
(out / "result.json").write_text(text)
print("this is", args.kind, flush=True)
if args.kind == "slow":
    subprocess.Popen(["sleep", "100"])
time.sleep({"fast": 0.05, "middle": 0.4, "slow": 60}.get(args.kind, 0))
sys.exit({"wrong": 1, "crash": "error: no luck", "left": 75}.get(args.kind, 0))
"""
ENVIRONMENT = ("environment", "the machine", "fake", ("--kind", "fast"), 60, True)


def fake(name: str, kind: str, seconds: int = 20, alone: bool = False) -> tuple[Any, ...]:
    return (name, f"shows {kind}", "fake", ("--kind", kind), seconds, alone)


class Driver:
    """Calls of one driver with the parts ``rows`` and a folder for its results."""

    def __init__(self, tmp_path: Path, *rows: tuple[Any, ...]) -> None:
        self.folder, self._script = tmp_path / "out", tmp_path / "driver.py"
        (tmp_path / "fake.py").write_text(FAKE)
        places = {"here": str(tmp_path), "benchmarks": str(ROOT / "benchmarks"), "root": str(ROOT)}
        self._script.write_text(DRIVER.format(**places, rows=(ENVIRONMENT, *rows)))

    def start(self, *flags: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(self._script), "--out", str(self.folder), *map(str, flags)]
        # Parts run as `python -m fake` in the checkout.
        env = {**os.environ, "PYTHONPATH": str(self._script.parent)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def call(self, *flags: object) -> tuple[int, str, str]:
        process = self.start(*flags)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def table(self) -> list[str]:
        """The table without what differs between calls: seconds and the commit."""
        lines = (self.folder / "table.md").read_text().splitlines()
        return [line.split(" in ")[0] for line in lines[1:]]

    def verdict(self, name: str) -> str:
        return str(json.loads((self.folder / name / "verdict.json").read_text())["verdict"])


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether ``condition`` comes true."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_written(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def is_gone(group: int) -> bool:
    """Whether no process of ``group`` runs; a dead one may wait a moment until it is reaped."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


BOTH_WAYS = pytest.mark.parametrize("flags", [(), ("--rehearse",)], ids=["processes", "forked"])


@BOTH_WAYS
def test_a_failure_or_a_time_out_stops_nothing(tmp_path: Path, flags: tuple[str, ...]) -> None:
    rows = [fake("wrong", "wrong"), fake("endless", "slow", 3), fake("crash", "crash"), fake("left", "left")]
    driver = Driver(tmp_path, *rows, fake("last", "fast", alone=True))
    code, printed, err = driver.call(*flags)
    assert (code, err) == (1, "")
    verdicts = {name: driver.verdict(name) for name in ("wrong", "endless", "crash", "left", "last")}
    assert verdicts == {
        "wrong": "failed", "endless": "timed out", "crash": "failed", "left": "left out", "last": "done"
    }  # fmt: skip
    assert driver.table()[:4] == [
        "WRONG    wrong: a check: it is wrong",
        "TOO LONG endless: stopped after 3 s; see endless/log.txt",
        "FAILED   crash: see crash/log.txt; once mended: --again crash",
        "LEFT OUT left: note of left",
    ]
    assert "done     last" in driver.table()
    assert (driver.folder / "crash" / "log.txt").read_text() == "this is crash\nerror: no luck\n"
    assert printed.index("WRONG") < printed.index("TOO LONG")


@BOTH_WAYS
def test_the_processes_of_a_stopped_part_end(tmp_path: Path, flags: tuple[str, ...]) -> None:
    driver = Driver(tmp_path, fake("endless", "slow", 3))
    driver.call(*flags)
    pid = int((driver.folder / "endless" / "pid").read_text())
    assert eventually(lambda: is_gone(pid))


def test_the_next_call_continues(tmp_path: Path) -> None:
    driver = Driver(tmp_path, *(fake(f"part{i}", "middle", alone=True) for i in range(6)))
    code, printed, _ = driver.call("--rehearse", "--minutes", 1.2 / 60)
    assert code == 0
    assert "NOT RUN  call again for part" in printed
    code, printed, _ = driver.call("--rehearse")
    assert code == 0
    assert "NOT RUN  call again for part" not in printed
    assert all(driver.verdict(f"part{i}") == "done" for i in range(6))


def test_finished_parts_are_not_repeated_unless_asked_for(tmp_path: Path) -> None:
    driver = Driver(tmp_path, fake("one", "fast"), fake("two", "crash"), fake("three", "left"))
    driver.call("--rehearse")
    pids = {name: (driver.folder / name / "pid").read_text() for name in ("environment", "one", "two", "three")}
    driver.call("--rehearse", "--again", "two")
    again = {name: (driver.folder / name / "pid").read_text() for name in pids}
    assert [name for name in pids if pids[name] != again[name]] == ["two", "three"]


def test_killed_at_random_and_repeated_the_table_is_the_same(tmp_path: Path) -> None:
    rows = [fake("one", "middle"), fake("two", "wrong"), fake("three", "middle", alone=True), fake("four", "fast")]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Driver(tmp_path / "whole", *rows), Driver(tmp_path / "killed", *rows)
    whole.call("--rehearse")
    draw = random.Random(0)
    for _ in range(4):
        process = killed.start("--rehearse")
        time.sleep(draw.uniform(0.1, 1.2))
        process.kill()
        process.communicate()
    code, _, _ = killed.call("--rehearse")
    assert code == 1
    assert killed.table() == whole.table()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_parts_and_lose_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    driver = Driver(tmp_path, fake("one", "fast"), fake("two", "slow"))
    process = driver.start("--rehearse")
    working = driver.folder / ".working" / "two" / "pid"
    assert eventually(lambda: (driver.folder / "one" / "verdict.json").exists() and is_written(working))
    pid = int(working.read_text())
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert "stopped; call again to continue" in printed
    assert driver.verdict("one") == "done"
    assert eventually(lambda: is_gone(pid))


def test_a_wrong_call_is_one_line(tmp_path: Path) -> None:
    driver = Driver(tmp_path, fake("speed", "fast"))
    for flags, text in [
        (("--only", "sped"), "error: no part is called 'sped'; did you mean speed?; the parts are environment, speed"),
        (("--minutes", "0"), "error: --minutes 0 must be above 0; use 8"),
        (("--minutes", "x"), "error: argument --minutes: invalid float value: 'x'; see --help"),
        (("--table",), f"error: --out {driver.folder} holds no results; run without --table first"),
    ]:
        code, _, err = driver.call(*flags)
        assert (code, err.strip()) == (2, text)


def test_a_folder_is_for_one_call_and_one_machine(tmp_path: Path) -> None:
    driver = Driver(tmp_path, fake("two", "middle"))
    driver.call("--rehearse")
    code, _, err = driver.call()
    assert code == 2
    assert f"--out {driver.folder} holds results from elsewhere (" in err
    assert "rehearsal: True there, False now); use another --out" in err
    with open(driver.folder / ".lock") as lock:
        importlib.import_module("fcntl").flock(lock, 2)
        code, _, err = driver.call("--rehearse")
    assert (code, err) == (
        2,
        f"error: --out {driver.folder} is in use by another call; wait for it, or use another --out\n",
    )
    (tmp_path / "file").write_text("")
    driver.folder = tmp_path / "file"
    assert "--out" in driver.call("--rehearse")[2]


def test_without_a_gpu_the_first_part_says_so(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--out", str(tmp_path / "out"), "--only", "kernels"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the GPU cannot be used; ")
    assert line.endswith("sees no CUDA device; use --rehearse on a CPU")


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    """All parts as on a GPU, at toy sizes: nothing is wrong, and every target has a figure to be compared with."""
    out, path = tmp_path / "out", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", "--minutes", "30", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    about, *table = (out / "table.md").read_text().splitlines()
    assert about.startswith("none (a rehearsal), torch ")
    (words,) = (line.split() for line in table if "targets have a figure" in line)
    assert words[0] == words[2], "a target has no figure"
    assert {line.split()[0] for line in table} <= {"done", "LEFT", words[0]}
    listed = subprocess.run(
        [*command[:2], "--list"], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    ended = [line.split()[1] for line in table if line.startswith("done")]
    assert ended == [line.split()[0] for line in listed.stdout.splitlines()[:-1]]


# What the table says.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_targets_are_missed_by_their_distance(gpu: Any) -> None:
    targets = importlib.import_module("gpu.targets")
    faster, closer = targets.Target("a", "speed", 1.2), targets.Target("b", "error", 0.05, at_most=True)
    zero = targets.Target("c", "waits", 0, at_most=True)
    assert [faster.met(value) for value in (1.2, 1.3, 1.19, float("nan"))] == [True, True, False, False]
    assert [closer.met(value) for value in (0.05, 0.01, 0.06, float("nan"))] == [True, True, False, False]
    assert faster.missed_by(0.6) == pytest.approx(0.5)
    assert closer.missed_by(0.1) == pytest.approx(1.0)
    assert zero.missed_by(3) == 3.0
    assert faster.missed_by(2.0) == 0.0


def test_the_table_begins_with_the_worst(gpu: Any) -> None:
    table = importlib.import_module("gpu.table")
    figures = {
        "speed.dense128.mfu": 0.5,
        "speed.large.mfu": 0.3,
        "costs.host_waits": 0.0,
        "memory.worst_error": float("nan"),
    }
    missed, not_run, met = table.target_lines(figures)
    assert [line.split(":")[0] for line in missed] == [
        "MISSED   --dry_run", "MISSED   1B", "MISSED   0.25B, heads of 128"
    ]  # fmt: skip
    assert missed[1].endswith("MFU of the measured product rate: 30.0% (at least 55.0%), by 45%")
    assert met == ["met      host waits in a dense training step: 0 (at most 0)"]
    assert "speed.experts.over_transformers" in not_run


def test_the_table_is_short(gpu: Any, tmp_path: Path) -> None:
    table, parts = importlib.import_module("gpu.table"), importlib.import_module("gpu.parts")
    for part in parts.PARTS:
        (tmp_path / part.name).mkdir()
        problems = {f"check {i}": "wrong " * 50 for i in range(30)}
        (tmp_path / part.name / "result.json").write_text(json.dumps({"problems": problems}))
        (tmp_path / part.name / "verdict.json").write_text(json.dumps({"verdict": "failed", "seconds": 1}))
    lines = table.report_lines(tmp_path)
    assert len(lines) <= 60
    assert max(map(len, lines[1:])) <= 150
    assert sum("check" in line for line in lines) > 10, "one part must not hide the others"
    assert "more" in lines[21]


@pytest.fixture
def real_run(gpu: Any, tmp_path: Path) -> Any:
    return importlib.import_module("gpu.real_run")


def curve(steps: int, shift: float = 0.0) -> dict[str, dict[int, float]]:
    return {"train": {i: 8.3 - 5 * (i - 1) / steps + shift for i in range(1, steps + 1)}, "val": {steps: 3.4 + shift}}


def problems_of(real_run: Any, folder: Path, losses: Any) -> set[str]:
    result = real_run.Result(folder)
    record = folder / "record.json"
    record.write_text(json.dumps({"precision": "fp32", **curve(10)}))
    real_run.check_losses(result, losses, 10, 4096, 2.0)
    real_run.compare_with_record(result, losses, record)
    return {name for name, problem in result.problems.items() if problem}


def test_a_wrong_loss_curve_is_wrong(real_run: Any, tmp_path: Path) -> None:
    near = "the losses are those recorded on a CPU"
    assert problems_of(real_run, tmp_path, curve(10)) == set()
    assert problems_of(real_run, tmp_path, curve(10, shift=0.15)) == {near}
    hole, flat, nan = curve(10), curve(10), curve(10)
    del hole["train"][5]
    flat["train"] |= dict.fromkeys(range(2, 11), 8.3)
    nan["val"][10] = float("nan")
    assert problems_of(real_run, tmp_path, hole) == {near, "every step is logged"}
    assert problems_of(real_run, tmp_path, flat) == {near, "the model learns"}
    assert problems_of(real_run, tmp_path, nan) == {near}
    assert "the first loss is ln V" in problems_of(real_run, tmp_path, curve(10, shift=-1.0))


def test_the_record_is_whole(real_run: Any, tmp_path: Path) -> None:
    recorded = json.loads(real_run.RECORD.read_text())
    steps = importlib.import_module("gpu.sizes").FULL.train_steps
    assert [int(step) for step in recorded["train"]] == list(range(1, steps + 1))
    assert [int(step) for step in recorded["val"]] == [steps // 2, steps]
    assert recorded["precision"] == "fp32"
    result = real_run.Result(tmp_path)
    real_run.compare_with_record(result, recorded | {"val": {}}, tmp_path / "none.json")
    assert "none.json is missing" in next(iter(result.problems.values()))


def test_sizes_fit_the_gpu(gpu: Any) -> None:
    sizes = importlib.import_module("gpu.sizes")
    gib = 2**30
    cases = {
        (80, (9, 0)): ("full", "bf16"), (141, (9, 0)): ("full", "bf16"), (40, (8, 0)): ("medium", "bf16"),
        (24, (8, 9)): ("medium", "bf16"), (12, (8, 6)): ("small", "bf16"), (32, (7, 0)): ("small", "fp32"),
        (16, (7, 5)): ("small", "fp32"),
    }  # fmt: skip
    for (memory, capability), expected in cases.items():
        chosen = sizes.choose_sizes(memory * gib, capability)
        assert (chosen.name, chosen.precision) == expected
        assert set(chosen.models) == set(sizes.ROLES)


def test_advice_follows_from_the_figures(gpu: Any) -> None:
    advice = importlib.import_module("gpu.advice").advice
    figures = {
        "speed.dense128.compiled_over_eager": 1.4,
        "operations.attention.plain.sdpa": 2.0,
        "operations.attention.plain.varlen": 2.2,
        "operations.attention.documents.sdpa": 9.0,
        "operations.attention.documents.varlen": 1.5,
        "operations.attention.documents.math": 1.0,
        "kernels.combine.gain": 1.6,
        "kernels.gram.gain": 0.8,
        "speed.options.selective": 0.99,
        "speed.options.selective_memory": 0.7,
    }
    assert list(advice(figures)) == [
        "advice   --use_compile: compiled steps run at 1.40 times the eager speed",
        "advice   --attn_backend sdpa without documents: 2.00 ms",
        "advice   --attn_backend varlen with documents: 1.50 ms, sdpa 9.00 ms",
        "advice   --use_triton_kernels pays for combine 1.60; not for gram 0.80 (times the speed of the best twin)",
        "advice   --recompute selective: selective runs at 0.99 times the speed with 0.70 times the memory",
    ]
    assert list(advice({})) == []
