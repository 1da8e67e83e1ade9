"""``tinytron compare``: runs next to each other, and which is the best."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_folders import HOSTILE, make_run, records
from tinytron.cli.main import main


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def make(folder: Path, better: float = 0.0, steps: int = 100, **options: Any) -> Path:
    entries = records(steps)
    for entry in entries:
        entry["loss"] -= better
    return make_run(folder, entries, **options)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        make(tmp_path / "a", precision="fp32"),
        make(tmp_path / "b", 0.5, precision="bf16"),
        make(tmp_path / "c", 0.25, 40, precision="fp32"),
    ]


def test_the_table_has_what_differs_and_names_the_best(three: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, *three).splitlines()
    assert lines[0].split() == [
        "run",
        "precision",
        "state",
        "steps",
        "tokens",
        "loss",
        "val",
        "loss",
        "best",
        "val",
        "tok/s",
    ]
    assert lines[-1].startswith("best: b (validation loss 2.5256)")
    (row,) = (line.split() for line in lines if line.startswith("b "))
    assert row[:5] == ["b", "bf16", "finished", "100", "9,600"]
    assert row[-1] == "1,100"
    (row,) = (line.split() for line in lines if line.startswith("c "))
    assert row[1:5] == ["fp32", "running", "40", "3,840"]


def test_json_and_csv_have_the_same_numbers_unrounded(three: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, *three, "--json"))
    assert (found["best"], found["by"]) == ("b", "best_val_loss")
    rows = list(csv.DictReader(io.StringIO(said(capsys, *three, "--csv"))))
    assert [row["run"] for row in rows] == ["a", "b", "c"]
    for row, entry in zip(rows, found["runs"], strict=True):
        assert float(row["best_val_loss"]) == entry["best_val_loss"]
        assert row["train.precision"] == entry["options"]["train.precision"]
    assert found["runs"][0]["best_val_loss"] - found["runs"][1]["best_val_loss"] == pytest.approx(0.5)
    assert len(f"{found['runs'][0]['loss']}") > 8


def test_without_validation_the_last_training_loss_decides_and_it_is_said(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_run(tmp_path / "d", [e for e in records(100) if e["stage"] == "train"], precision="fp32")
    lines = said(capsys, *three, plain).splitlines()
    assert lines[-2].startswith("best: b (last training loss")
    assert lines[-1] == "not every run was validated, so the last training losses decide"
    empty = make_run(tmp_path / "e", [])
    lines = said(capsys, *three, empty).splitlines()
    assert lines[-1].startswith("best: b (validation loss")  # a run that has not begun does not count
    assert said(capsys, empty).splitlines()[-1] == "no run has a loss yet"
    assert json.loads(said(capsys, empty, "--json"))["best"] is None


def test_losses_of_different_tokens_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path / "a", seq_len=12), make(tmp_path / "b", seq_len=24)]
    assert (
        said(capsys, *runs).splitlines()[-1]
        == "the runs differ in train.seq_len: their losses may be of different tokens"
    )


def test_a_name_or_an_option_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path / "a", precision=HOSTILE), make(tmp_path / "b\x1b[31m")]
    out = said(capsys, *runs)
    assert "\x1b" not in out
    assert len(out.splitlines()) == 6


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "none") in line
