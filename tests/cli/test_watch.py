"""``tinytron watch`` and ``tinytron report`` as a user starts them."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.run_folders import lines, make_run, records
from tests.helpers.runs import ROOT
from tinytron.cli.main import main
from tinytron.cli.watch import open_runs


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.removeprefix("error: ").rstrip()


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinytron", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_the_page_is_served_until_ctrl_c(tmp_path: Path) -> None:
    process = start("watch", make_run(tmp_path / "one", records(5)), "--port", 0)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"watching one at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)[1]  # type: ignore[index]
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"<title>Tinytron runs</title>" in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_the_table_follows_a_run_in_the_terminal(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", records(5), max_steps=5)
    process = start("watch", folder, "--tui")
    assert process.stdout is not None
    try:
        shown = [process.stdout.readline() for _ in range(4)]
        make_run(folder, records(9), max_steps=9)
        later = [process.stdout.readline() for _ in range(4)]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert shown[1].split()[:4] == ["one", "finished", "5", "5"]
    assert later[1].split()[:4] == ["one", "finished", "9", "9"]


def test_the_table_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, records(5), max_steps=5) for name in ("a/one", "b/one")]
    assert main(["watch", "--once", *map(str, folders)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["a/one", "b/one"]


def test_a_report_and_its_default_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "one", records(5))
    for words, name in (((), "report.html"), (("-o", "x.HTM"), "x.HTM"), (("--out", "y.html"), "y.html")):
        assert main(["report", str(folder), *words]) == 0
        assert capsys.readouterr().out == f"wrote {name}, {(tmp_path / name).stat().st_size:,} bytes\n"
    pytest.importorskip("matplotlib")
    assert main(["report", str(folder), "--png", "--curves", "loss", "lr"]) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_run(tmp_path / "one", records(5))
    error = failed(capsys, "report", folder, "--png", "-o", tmp_path / "x.png")
    assert re.fullmatch(r'the package matplotlib is needed \(.*\); run: pip install "tinytron\[report\]"', error)


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "it has neither log.jsonl nor config.json"
    (tmp_path / "empty").mkdir()
    text = f"{tmp_path}/empty is not a run folder: {rule}; use a run folder such as log/<run>"
    assert failed(capsys, "watch", tmp_path / "empty") == text
    make_run(tmp_path / "logs" / "old", records(2))
    make_run(tmp_path / "logs" / "older", records(2))
    os.utime(tmp_path / "logs" / "older" / "log.jsonl", (9e8, 9e8))
    make_run(tmp_path / "logs" / "deep" / "er", records(2))
    os.utime(tmp_path / "logs" / "old" / "log.jsonl", (1e9, 1e9))
    text = f"{tmp_path}/logs is not a run folder: {rule}; use {tmp_path}/logs/old"
    assert failed(capsys, "report", tmp_path / "logs") == text
    missing = tmp_path / "none"
    assert failed(capsys, "watch", missing) == f"{missing} is not a folder; use a run folder such as log/<run>"
    assert [run.name for run in open_runs([f"{tmp_path}/logs/old/log.jsonl"])] == ["old"]


def test_a_folder_with_runs_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "jobs" / "mine"
    make_run(job / "mine_1", records(5), max_steps=5)
    (job / "logs").mkdir()
    assert [run.name for run in open_runs([f"{job}/"])] == ["mine_1"]
    assert main(["watch", "--once", str(job)]) == 0
    assert "mine_1  finished" in capsys.readouterr().out
    other = make_run(tmp_path / "jobs" / "other" / "other_1", records(5), max_steps=5)
    make_run(job / "mine_2", records(5), max_steps=5)
    os.utime(job / "mine_1" / "log.jsonl", (1e9, 1e9))
    assert failed(capsys, "watch", job).endswith(f"; use {job}/mine_2")
    assert main(["compare", str(job), str(other.parent), "--csv"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0] for row in rows] == ["run", "mine_1", "mine_2", "other_1"]
    assert failed(capsys, "compare", job, job / "mine_1") == f"{job}/mine_1 is named twice; name each run once"
    assert failed(capsys, "compare", tmp_path / "jobs").endswith(f"use {job}/mine_2")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("watch", "{}", "--port", "70000"), "--port 70000 must be in 0..65535; use 0 for any free one"),
        (("watch", "{}", "{}/"), "{}/ is named twice; name each run once"),
        (("watch", "{}", "--once", "--tui"), "argument --tui: not allowed with argument --once; see --help"),
        (("report", "{}", "-o", "x.docx"), "--out x.docx must end in .html or .htm; use x.html"),
        (("report", "{}", "-o", "x.png"), "--out x.png must end in .html or .htm; --png draws pictures; use x.html"),
        (("report", "{}", "--png", "-o", "x.gif"), "--out x.gif must end in .png or .pdf or .svg; use x.png"),
        (("report", "{}", "-o", "no/x.html"), "--out no/x.html: the folder no does not exist; make it, or use x.html"),
        (
            ("report", "{}", "--curves", "loss"),
            "--curves chooses what --png draws, and the page has every curve; add --png, or drop it",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "one", records(2))
    assert failed(capsys, *(word.format(folder) for word in words)) == text.format(folder)


@pytest.mark.slow
def test_a_million_lines_open_within_two_seconds(tmp_path: Path) -> None:
    """From the command to curves of their whole length; the rest of the log is read afterwards. The better of two times:
    other programs may be busy."""
    folder = make_run(tmp_path / "one", [], max_steps=10**6)
    (line,) = lines([record for record in records(1) if record["stage"] == "train"]).splitlines()
    with open(folder / "log.jsonl", "w") as file:
        file.writelines(line.replace('"step": 1,', f'"step": {step},') + "\n" for step in range(1, 10**6 + 1))
    times = []
    for _ in range(2):
        began = time.monotonic()
        process = start("watch", folder, "--port", 0)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split(" at ")[1].split()[0]
            with urllib.request.urlopen(f"{url}api/runs/0", timeout=30) as answer:
                shown = json.load(answer)
            times.append(time.monotonic() - began)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        (loss,) = (curve for curve in shown["curves"] if curve["chart"] == "loss")
        assert (loss["x"][0], loss["x"][-1]) == (1, 10**6)
        assert max(b - a for a, b in itertools.pairwise(loss["x"])) < 10**6 / 4
    assert min(times) < 2, times
