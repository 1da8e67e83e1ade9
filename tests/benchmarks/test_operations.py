"""benchmarks/operations.py: both tables, and what cannot run is a line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.helpers.runs import ROOT


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "operations.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_operations_and_ways_to_attend_are_tables() -> None:
    done = run("--model", "tiny", "--batch", "2", "--seq_len", "64", "--rounds", "1", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    names = [row[0] for row in table]
    start = names.index("--attn_backend")
    expected = ["query, key, value", "attention out", "gate, up", "down", "attention", "RMSNorm", "silu(gate) * up"]
    assert names[2:start] == [*expected, "rotation", "head and loss"]
    assert names[start + 2 :] == ["auto", "sdpa", "math"]
    assert all(float(cell) > 0 for row in table[start + 2 :] for cell in row[1:])
    missing = [line for line in done.stdout.splitlines() if line.startswith("not here: ")]
    assert [line.split()[3] for line in missing] == ["flash", "varlen"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_needs_a_gpu() -> None:
    done = run("--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda needs a GPU, and this machine has none; use --device cpu" in done.stderr
