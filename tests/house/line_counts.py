"""The line counts in docs/architecture.md: ``python -m tests.house.line_counts`` rewrites them from the code.

A row ``| `a.py` `folder/{b,c}.py` | 120 | ... |`` counts those files (of a folder: all), and a row
``| all of these | 450 |`` the table so far. Counts are rounded, and one that is still about right stays, so that few
changes touch the page.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "tinytron"
_ROW = re.compile(r"\| ((?:`[^`]+` ?)+)\| ([\d,]+) \|(.*)")
_SUM = re.compile(r"\| all of these \| ([\d,]+) \|(.*)")
TOLERANCE = 0.03


def files_of(pattern: str) -> list[Path]:
    """The files that ``folder/``, ``file.py`` or ``folder/{a,b}.py`` names. Raises: AssertionError if one is missing."""
    if pattern.endswith("/"):
        found = sorted((PACKAGE / pattern).rglob("*.py"))
        assert found, f"{PAGE.name} names {pattern}, which has no files"
        return found
    before, inner, after = re.fullmatch(r"([^{]*)\{?([^}]*)\}?(.*)", pattern).groups()  # type: ignore[union-attr]
    names = [f"{before}{name}{after}" for name in inner.split(",")]
    if missing := [name for name in names if not (PACKAGE / name).is_file()]:
        raise AssertionError(f"{PAGE.name} names {missing[0]}, which is not in {PACKAGE.name}/")
    return [PACKAGE / name for name in names]


def tables(page: str) -> list[list[Path]]:
    """The files that each counted table of ``page`` names, in order."""
    found: list[list[Path]] = [[]]
    for line in page.splitlines():
        if row := _ROW.fullmatch(line):
            found[-1] += [path for pattern in row[1].replace("`", "").split() for path in files_of(pattern)]
        elif _SUM.fullmatch(line):
            found.append([])
    return found[:-1]


def _rounded(count: int, before: str) -> str:
    """``before``, if it is about ``count``; else ``count`` to the nearest ten, above a thousand to the nearest 50."""
    if abs(int(before.replace(",", "")) - count) <= TOLERANCE * count:
        return before
    unit = 50 if count > 1000 else 10
    return f"{round(count / unit) * unit:,}"


def updated(page: str) -> str:
    """``page`` with true counts."""
    lines, total = [], 0
    for line in page.splitlines():
        if row := _ROW.fullmatch(line):
            patterns = row[1].replace("`", "").split()
            count = sum(len(path.read_text().splitlines()) for pattern in patterns for path in files_of(pattern))
            total += count
            line = f"| {row[1]}| {_rounded(count, row[2])} |{row[3]}"
        elif end := _SUM.fullmatch(line):
            line, total = f"| all of these | {_rounded(total, end[1])} |{end[2]}", 0
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
