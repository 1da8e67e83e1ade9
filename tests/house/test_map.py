"""tests/README.md has a row for everything under tests/, and its numbers come from pytest's own output."""

from __future__ import annotations

import re

import pytest

from tests.house.map_of_tests import PAGE, ROOT, counts_of, rows, seconds_of, updated

TESTS = ROOT / "tests"
TEXT = PAGE.read_text()


def test_every_folder_is_in_the_map() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert sorted(rows(TEXT)) == sorted(folders)


def test_files_that_the_map_mentions_are_there() -> None:
    mentioned = set(re.findall(r"`((?:\w+/)?[\w{},]+\.py)`", TEXT))
    assert len(mentioned) > 15
    for name in mentioned:
        before, inner, after = re.fullmatch(r"([^{]*)\{?([^}]*)\}?(.*)", name).groups()  # type: ignore[union-attr]
        for one in inner.split(","):
            assert (TESTS / f"{before}{one}{after}").exists(), name


def test_helpers_are_in_the_map() -> None:
    helpers = {p.stem for p in (TESTS / "helpers").glob("*.py") if not p.name.startswith(("_", "test_"))}
    section = TEXT.split("## Helpers")[1].split("##")[0]
    assert {name for name in helpers if not re.search(rf"\b{name}\b", section)} == set()


def test_numbers_are_pytests() -> None:
    log = """
========= slowest durations =========
20.50s call     tests/model/test_gpt.py::test_a[1]
4.00s setup    tests/model/test_moe.py::test_b
0.10s teardown tests/test_top.py::test_c
"""
    assert seconds_of(log) == {"model": 24.5, "test_top.py": pytest.approx(0.1)}
    tests = counts_of("tests/model/test_gpt.py: 1200\ntests/model/test_moe.py: 3\ntests/test_top.py: 2\n")
    assert tests == {"model": 1203, "test_top.py": 2}
    page = "| `model/` | a | b | 1 | 2 | ? |\n| `test_top.py` | a | b | 1 | 2 | 7 |\n"
    new = updated(page, tests, counts_of(""), {"model": 24.5})
    assert new == "| `model/` | a | b | 1,203 | 0 | 20 |\n| `test_top.py` | a | b | 2 | 0 | 7 |\n"
