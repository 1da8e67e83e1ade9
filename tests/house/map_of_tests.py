"""The numbers in tests/README.md: ``python -m tests.house.map_of_tests LOG`` rewrites them.

LOG is the output of ``pytest -m "not slow and not gpu" -vv --durations=0``, of all tests or some: folders that it lacks
keep their time. The tests themselves are counted by collecting them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "tests" / "README.md"
NOT_SLOW, SLOW = "not slow", "slow"
_ROW = re.compile(r"\| `([\w.]+)/?` \|(.*)\| ([\d,]+) \| ([\d,]+) \| ([\d,?]+) \|")
_DURATION = re.compile(r"([\d.]+)s (?:call|setup|teardown) +tests/([^/:]+)")
_COLLECTED = re.compile(r"tests/([^/:]+)[^:]*: (\d+)")


def rows(page: str) -> list[str]:
    """The names in the rows of the map: folders, and files next to them."""
    return [row[1] for line in page.splitlines() if (row := _ROW.fullmatch(line))]


def seconds_of(log: str) -> Counter[str]:
    """Seconds by folder, from pytest's list of durations."""
    total: Counter[str] = Counter()
    for seconds, folder in _DURATION.findall(log):
        total[folder] += float(seconds)  # type: ignore[assignment]
    return total


def counts_of(collected: str) -> Counter[str]:
    """Tests by folder, from the output of ``pytest --collect-only -qq``."""
    total: Counter[str] = Counter()
    for folder, count in _COLLECTED.findall(collected):
        total[folder] += int(count)
    return total


def updated(page: str, tests: Mapping[str, int], slow: Mapping[str, int], seconds: Mapping[str, float]) -> str:
    """``page`` with these numbers, rounded."""

    def row(match: re.Match[str]) -> str:
        name, middle, _, _, before = match.groups()
        time = _rounded(seconds[name]) if name in seconds else before
        return f"| `{name}{'' if '.' in name else '/'}` |{middle}| {tests[name]:,} | {slow[name]:,} | {time} |"

    return "\n".join(_ROW.sub(row, line) for line in page.splitlines()) + "\n"


def _rounded(seconds: float) -> str:
    return f"{round(seconds / 10) * 10 or round(seconds) or 1:,}"


def _collected(marks: str) -> Counter[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marks, "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return counts_of(done.stdout)


if __name__ == "__main__":
    log = Path(sys.argv[1]).read_text()
    PAGE.write_text(updated(PAGE.read_text(), _collected(NOT_SLOW), _collected(SLOW), seconds_of(log)))
