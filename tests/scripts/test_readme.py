"""README.md is short, and the examples of the pages run without a change."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT


def test_the_readme_begins_with_the_two_commands_and_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    first = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert first is not None
    commands = [line.split("#")[0].strip() for line in first[1].splitlines()]
    assert commands == ["bash scripts/quickstart/pretrain.sh", "bash scripts/test.sh"]


@pytest.mark.parametrize(("page", "heading"), [("docs/reference/configuration.md", "From Python")])
def test_a_python_example_runs(tmp_path_factory: pytest.TempPathFactory, page: str, heading: str) -> None:
    place = tmp_path_factory.mktemp("page")
    text = (ROOT / page).read_text()
    found = re.search(rf"^## {heading}\n.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    (place / "example.py").write_text(found[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"log/gpt_[0-9a-f]{8} 10", last)
