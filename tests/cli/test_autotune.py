"""``tinytron autotune``: real runs on a tiny model, and a stand-in that fails in every way."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, TINY
from tinytron.cli import autotune
from tinytron.cli.autotune import main
from tinytron.errors import ConfigError

# Fails as its --batch_size says; the others log 100 tokens a second, but 10 in the steps of the warm-up.
STAND_IN = """
import json, os, pathlib, signal, sys, time
value = dict(zip(sys.argv[1:], sys.argv[2:]))
kind, rank = int(value["--batch_size"]), int(os.environ["RANK"])
log_dir = pathlib.Path(value["--log_dir"])
(pathlib.Path(__file__).parent / f"pid_{kind}_{rank}").write_text(str(os.getpid()))
if kind == 2:
    print("Traceback (most recent call last):\\n  ...\\ntorch.OutOfMemoryError: CUDA out of memory. Tried", file=sys.stderr)
    sys.exit(1)
if kind == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if kind == 4:
    raise ValueError("the sizes do not fit")
if kind == 5 or (kind == 6 and rank == 0):
    time.sleep(600)
if kind == 6:
    print("error: rank 1 has a reason", file=sys.stderr)
    sys.exit(2)
steps, warmup = int(value["--max_steps"]), int(value["--log_every"])
if rank == 0:
    folder = log_dir / "gpt_0"
    folder.mkdir()
    rates = [10.0 if step <= warmup else 100.0 * kind for step in range(1, (steps if kind != 7 else 3) + 1)]
    lines = [{"step": i + 1, "stage": "train", "tokens_per_second": r, "mfu": r / 1e4} for i, r in enumerate(rates)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def gone(path: Path) -> bool:
    """The process that wrote its id to ``path`` has ended."""
    try:
        os.kill(int(path.read_text(encoding="utf-8")), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_real_runs_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    flags = [str(word) for word in TINY]
    words = ["--batch_sizes", "2", "3", "8", "--target_steps", "2", "--warmup_steps", "1", "--nproc_per_node", "1"]
    assert main([*words, "--csv", str(results), "--", *_without(flags, "--batch_size", "--log_dir")]) == 0
    rows = rows_of(results)
    assert [(row["sep_size"], row["batch_size"], row["status"]) for row in rows] == [
        ("1", "2", "ok"),
        ("1", "3", "failed"),
        ("1", "8", "ok"),
    ]
    assert "must be a multiple of --batch_size x --seq_len" in rows[1]["reason"]
    speeds = {row["batch_size"]: float(row["tokens_per_second"]) for row in rows if row["status"] == "ok"}
    fastest = max(speeds, key=lambda size: speeds[size])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("fastest: tinytron launch --nproc_per_node 1 -m tinytron pretrain ")
    assert last.endswith(f" --sep_size 1 --batch_size {fastest}")


def _without(flags: list[str], *names: str) -> list[str]:
    """``flags`` without those of ``names``, each of which has one value."""
    kept = list(flags)
    for name in names:
        if name in kept:
            del kept[kept.index(name) : kept.index(name) + 2]
    return kept


def test_failures_are_told_apart(stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--batch_sizes", *"1234789", "--script", str(stand_in), "--nproc_per_node", "1"]
    assert main([*words, "--target_steps", "4", "--warmup_steps", "2"]) == 0
    rows = rows_of(tmp_path / "autotune_results.csv")
    assert [row["status"] for row in rows] == ["ok", "oom", "oom", "failed", "failed", "ok", "ok"]
    assert [row["tokens_per_second"] for row in rows] == ["100.0", "", "", "", "", "800.0", "900.0"]
    assert rows[1]["reason"] == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert rows[2]["reason"] == "exit status -9"
    assert rows[3]["reason"] == "ValueError: the sizes do not fit"
    assert rows[4]["reason"] == "its log has 1 of 4 steps"
    shown = capsys.readouterr().out
    assert "sep_size 1, batch_size 2: oom torch.OutOfMemoryError" in shown
    assert shlex.split(shown.splitlines()[-1])[-4:] == ["--sep_size", "1", "--batch_size", "9"]


def test_a_run_that_takes_too_long_is_ended_with_all_its_processes(stand_in: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    words = ["--batch_sizes", "5", "1", "--script", str(stand_in), "--nproc_per_node", "2", "--timeout", "5"]
    assert main([*words, "--target_steps", "1", "--warmup_steps", "1"]) == 0
    assert time.monotonic() - start < 60
    rows = rows_of(tmp_path / "autotune_results.csv")
    assert [(row["status"], row["reason"]) for row in rows] == [("timeout", "not done after 5 s"), ("ok", "")]
    assert gone(tmp_path / "pid_5_0")
    assert gone(tmp_path / "pid_5_1")


def test_the_failure_of_one_process_ends_the_run(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(autotune, "_GRACE_SECONDS", 0.5)
    words = ["--batch_sizes", "6", "--script", str(stand_in), "--nproc_per_node", "2"]
    assert main(words) == 1
    (row,) = rows_of(tmp_path / "autotune_results.csv")
    assert (row["status"], row["reason"]) == ("failed", "error: rank 1 has a reason")
    assert gone(tmp_path / "pid_6_0")
    assert capsys.readouterr().out.splitlines()[-1] == "no run could be measured; the reasons are above"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "--batch_size", "4"], "--batch_size is set for each run; leave it out after --"),
        (["--", "--max_steps=4"], "--max_steps is set for each run"),
        (["--batch_sizes", "0"], "argument --batch_sizes: 0 must be at least 1"),
        (["--preset", "gpt2"], "unknown argument --preset"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main([*words, *([] if "--" in words else ["--nproc_per_node", "1"])])
    assert message in str(caught.value)


def test_the_script_takes_the_grid_from_the_environment(stand_in: Path, tmp_path: Path) -> None:
    variables = {"SEP_SIZES": "1 2", "BATCH_SIZES": "1 8", "TARGET_STEPS": "2", "WARMUP_STEPS": "1", "NPROC": "2"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the scripts take the active python
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/autotune.sh"), "--num_layer", "2"],
        env={**os.environ, **variables, "NUM_GPUS": "0", "SCRIPT": str(stand_in), "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [
        (row["sep_size"], row["batch_size"], row["tokens_per_second"])
        for row in rows_of(tmp_path / "autotune_results.csv")
    ] == [
        ("1", "1", "100.0"),
        ("1", "8", "800.0"),
        ("2", "1", "100.0"),
        ("2", "8", "800.0"),
    ]
    assert done.stdout.splitlines()[-1] == (
        f"fastest: tinytron launch --nproc_per_node 2 {stand_in} --num_layer 2 --sep_size 1 --batch_size 8"
    )
