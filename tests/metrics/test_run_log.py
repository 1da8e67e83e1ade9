"""The two log files of a run, also after a crash in the middle of a line."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytron.metrics import RunLog


def entry(step: int, stage: str = "train", loss: float = 2.5, **more: Any) -> dict[str, Any]:
    return {"step": step, "stage": stage, "loss": loss, **more}


def text_lines(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (10.82490511970208, "10.82490512"),
        (2.5, "2.500000000"),
        (0.0123456789012, "0.01234567890"),
        (123456.78901234, "123456.7890"),
        (1.0e-7, "1.000000000e-07"),
    ],
)
def test_losses_have_ten_significant_digits(tmp_path: Path, loss: float, shown: str) -> None:
    RunLog(tmp_path).write([entry(7, loss=loss), entry(7, "val", loss=loss)])
    assert text_lines(tmp_path) == [f"7 train {shown}", f"7 val {shown}"]
    assert records(tmp_path)[0]["loss"] == loss  # and all of them here


def test_writing_appends_whole_entries(tmp_path: Path) -> None:
    RunLog(tmp_path).write([entry(1, lr=0.1), entry(2, lr=0.2)])
    RunLog(tmp_path).write([entry(2, "val", tokens=64)])
    assert text_lines(tmp_path) == ["1 train 2.500000000", "2 train 2.500000000", "2 val 2.500000000"]
    assert records(tmp_path) == [entry(1, lr=0.1), entry(2, lr=0.2), entry(2, "val", tokens=64)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_text(tmp_path: Path, value: float) -> None:
    RunLog(tmp_path).write([entry(1, loss=value, grad_norm=value)])
    assert text_lines(tmp_path) == [f"1 train {value}"]

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["grad_norm"] == str(value)
    RunLog(tmp_path).keep_until(1)
    assert len(text_lines(tmp_path)) == len(records(tmp_path)) == 1


def test_later_lines_are_dropped_when_a_run_resumes(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write([entry(step) for step in (1, 9, 10)])
    log.write([entry(10, "val")])
    log.write([entry(step) for step in (11, 100)])
    log.keep_until(10)
    assert [line.split()[:2] for line in text_lines(tmp_path)] == [
        ["1", "train"], ["9", "train"], ["10", "train"], ["10", "val"],
    ]  # fmt: skip
    assert [r["step"] for r in records(tmp_path)] == [1, 9, 10, 10]
    log.write([entry(11, loss=1.0)])
    assert text_lines(tmp_path)[-1] == "11 train 1.000000000"
    log.keep_until(0)
    assert text_lines(tmp_path) == records(tmp_path) == []


def test_a_run_without_log_files_has_nothing_to_drop(tmp_path: Path) -> None:
    RunLog(tmp_path).keep_until(10)
    assert not list(tmp_path.iterdir())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), step=st.integers(0, 5))
def test_a_line_cut_short_is_dropped_wherever_it_is_cut(tmp_path: Path, cut: int, step: int) -> None:
    """Also where what is left reads like a whole line with fewer digits."""
    for file in tmp_path.iterdir():
        file.unlink()
    log = RunLog(tmp_path)
    log.write([entry(n, loss=1 / n) for n in (1, 2, 3, 4)])
    for name in ("log.txt", "log.jsonl"):
        content = (tmp_path / name).read_text()
        left = content[: cut % (len(content) + 1)]
        (tmp_path / name).write_text(left)
        whole = left[: left.rfind("\n") + 1].splitlines()
        log.keep_until(step)
        assert (tmp_path / name).read_text().splitlines() == whole[:step]


def test_lines_that_the_disk_refuses_wait_for_the_next_report(tmp_path: Path) -> None:
    """No file may grow beyond a limit: to a program that is a full disk."""
    log = RunLog(tmp_path)
    assert log.write([{"step": 1, "stage": "train", "loss": 1.0}]) is None
    before = (tmp_path / "log.txt").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        refused = log.write([{"step": 2, "stage": "train", "loss": 2.0}])
        again = log.write([{"step": 3, "stage": "train", "loss": 3.0}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused is not None
    assert again is not None
    assert "cannot be written (File too large); its lines wait for the next report" in refused
    assert (tmp_path / "log.txt").read_text() == before  # no part of a line
    assert log.write([{"step": 4, "stage": "train", "loss": 4.0}]) is None
    assert [line.split()[0] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["1", "2", "3", "4"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    assert log.write([{"step": 1, "stage": "train", "loss": 1.0}]) is None
    shutil.rmtree(tmp_path / "run")
    assert log.write([{"step": 2, "stage": "train", "loss": 2.0}]) is None
    assert (tmp_path / "run" / "log.txt").read_text().startswith("2 train")
