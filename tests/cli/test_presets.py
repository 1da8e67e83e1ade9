"""Every launch script's flags, by what they plan; and the table of presets in the documentation."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

# The quickstart is not here: it makes its data first, and sizes the model by that. Nor is shakespeare_char: three runs.
PRESETS = {
    "debug_gpt_0.25b": "230.84M parameters | 1.687 GFLOP per token",
    "debug_gpt_0.3b_a0.17b": "224.52M parameters, 97.12M of them active | 0.809 GFLOP per token",
    "example_gpt_0.25b": "230.84M parameters | 1.687 GFLOP per token",
    "gpt_1b": "1537.57M parameters | 10.433 GFLOP per token",
    "gpt_1b_modern": "1453.71M parameters | 10.131 GFLOP per token",
    "gpt_3b": "2745.58M parameters | 18.285 GFLOP per token",
    "gpt_7b": "7856.72M parameters | 50.361 GFLOP per token",
}
QUICK = ("gpt_1b_modern",)
NEEDS = {"example_gpt_0.25b": ("datasets", "transformers")}


def _environment(**variables: object) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the scripts take the active python
    return {**kept, "PATH": path, "NUM_GPUS": "0", **{name: str(value) for name, value in variables.items()}}


def _dry_run(preset: str, *flags: str, **variables: object) -> str:
    command = ["bash", f"scripts/{preset}/pretrain.sh", "--dry_run", *flags]
    done = subprocess.run(command, cwd=ROOT, env=_environment(**variables), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_script_is_here() -> None:
    scripts = {path.parent.name for path in (ROOT / "scripts").glob("*/pretrain.sh")}
    assert scripts == set(PRESETS) | {"quickstart", "shakespeare_char"}


@pytest.mark.parametrize(
    "preset", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_a_preset_is_planned(preset: str) -> None:
    if not all(importlib.util.find_spec(module) for module in NEEDS.get(preset, ())):
        pytest.skip(f"needs {', '.join(NEEDS[preset])}")
    planned = _dry_run(preset, "--dry_run_world_size", "8", "--backend", "nccl", "--log_dir", "nowhere")
    first, second = planned.splitlines()[:2]
    assert first == PRESETS[preset]
    assert second.startswith("8 x cuda = dp 8 x sep 1")
    assert re.search(r"^peak: \d+\.\d+ GiB on rank 0$", planned, re.MULTILINE)
    assert not (ROOT / "nowhere").exists()


@pytest.mark.slow
def test_the_scripts_variables_count() -> None:
    planned = _dry_run("gpt_1b", "--num_layer", "1", NPROC=2, SEP_SIZE=2, BATCH_SIZE=3, SEQ_LEN=8192, GBS=12)
    assert "2 x cpu = dp 1 x sep 2" in planned
    assert "98,304 tokens per step: 2 micro-batches of 6 x 8192 each" in planned


@pytest.mark.slow
def test_the_documented_table_is_that_of_the_command() -> None:
    command = [sys.executable, "benchmarks/presets.py", "--presets", "gpt_7b", "--world_sizes", "8", "64"]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(PYTHONPATH=ROOT), capture_output=True, text=True, check=True
    )
    documented = (ROOT / "docs" / "benchmarks.md").read_text()
    planned = done.stdout.splitlines()
    assert len(planned) == 4
    assert [line for line in planned if line not in documented.splitlines()] == []
