"""The examples in README.md run without a change."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT


@pytest.mark.parametrize("heading", ["From Python"])
def test_a_python_example_runs(tmp_path_factory: pytest.TempPathFactory, heading: str) -> None:
    place = tmp_path_factory.mktemp("readme")
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"\*\*{heading}\.\*\*.*?```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (place / "example.py").write_text(found[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"log/gpt_[0-9a-f]{8} 10", last)
