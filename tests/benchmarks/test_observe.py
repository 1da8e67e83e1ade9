"""benchmarks/observe.py: a row for every flag, and what points cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "observe.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_every_statistic_is_a_row() -> None:
    done = run("--model", "tiny", "--precision", "fp32", "--batch", "2", "--seq_len", "32", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    flags = [f"`--log_{name}`" for name in ("norms", "activations", "attention", "loss_by_position")]
    assert [row[0] for row in table[2:]] == ["none", *flags, "all of them"]
    assert all(float(row[1]) > 0 for row in table[2:])
    assert all(row[2].endswith("%") for row in table[3:])
    points, phases = done.stdout.splitlines()[-2:]
    assert points.startswith("20 points without hooks: ")
    assert phases.startswith("5 phases timed: ")
    assert all(float(line.split()[-4].rstrip("%")) < 50 for line in (points, phases))


def test_experts_are_refused() -> None:
    done = run("--model", "tiny-moe", "--precision", "fp32")
    assert done.returncode == 1
    assert "error: --model tiny-moe has experts; use one without, such as 10m" in done.stderr
