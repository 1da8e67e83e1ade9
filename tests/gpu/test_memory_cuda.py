"""The plan of a run against a GPU's allocator, as benchmarks/gpu/memory.py measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.device import GPU_TEST, REHEARSING, only_a_gpu_shows
from tests.helpers.runs import ROOT

pytestmark = GPU_TEST


def test_the_peak_is_within_five_percent(tmp_path: Path) -> None:
    """In a process whose allocator has seen nothing else."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    rehearse = ["--rehearse"] if REHEARSING else []
    command = [sys.executable, "-m", "gpu.memory", "--out", str(tmp_path), *rehearse]
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    assert not any(result["problems"].values()), result["problems"]
    only_a_gpu_shows("its bytes")
    assert result["figures"]["memory.worst_error"] <= 0.05, result["tables"]
