"""The two log files of a run, also after a crash in the middle of a line or on a full disk; and sinks that fail."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.ranks import Ranks
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError, StorageError
from tinytron.metrics.sinks import (
    SINKS,
    Background,
    Console,
    JsonLog,
    MessageLog,
    Record,
    RunInfo,
    Sink,
    TextLog,
    make_sinks,
)
from tinytron.training.run.reporter import Reporter

Pools = Callable[[int], Ranks]


class Logs:
    """Both files of a folder, as a run that goes on after ``step`` has them."""

    def __init__(self, folder: Path) -> None:
        self.sinks = TextLog(), JsonLog()
        for sink in self.sinks:
            sink.open(info(folder))

    def write(self, records: Sequence[Record]) -> None:
        for sink in self.sinks:
            sink.write(records)

    def keep_until(self, step: int) -> None:
        for sink in self.sinks:
            sink.resume(step)


def info(folder: Path) -> RunInfo:
    return RunInfo(folder, {}, first_step=0, max_steps=9, tokens_per_step=96)


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
    Logs(tmp_path).write([entry(7, loss=loss), entry(7, "val", loss=loss)])
    assert text_lines(tmp_path) == [f"7 train {shown}", f"7 val {shown}"]
    assert records(tmp_path)[0]["loss"] == loss  # and all of them here


def test_writing_appends_whole_entries(tmp_path: Path) -> None:
    Logs(tmp_path).write([entry(1, lr=0.1), entry(2, lr=0.2)])
    Logs(tmp_path).write([entry(2, "val", tokens=64)])
    assert text_lines(tmp_path) == ["1 train 2.500000000", "2 train 2.500000000", "2 val 2.500000000"]
    assert records(tmp_path) == [entry(1, lr=0.1), entry(2, lr=0.2), entry(2, "val", tokens=64)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_text(tmp_path: Path, value: float) -> None:
    Logs(tmp_path).write([entry(1, loss=value, grad_norm=value)])
    assert text_lines(tmp_path) == [f"1 train {value}"]

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["grad_norm"] == str(value)
    Logs(tmp_path).keep_until(1)
    assert len(text_lines(tmp_path)) == len(records(tmp_path)) == 1


def test_later_lines_are_dropped_when_a_run_resumes(tmp_path: Path) -> None:
    log = Logs(tmp_path)
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
    Logs(tmp_path).keep_until(10)
    assert not list(tmp_path.iterdir())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), step=st.integers(0, 5))
def test_a_line_cut_short_is_dropped_wherever_it_is_cut(tmp_path: Path, cut: int, step: int) -> None:
    """Also where what is left reads like a whole line with fewer digits."""
    for file in tmp_path.iterdir():
        file.unlink()
    log = Logs(tmp_path)
    log.write([entry(n, loss=1 / n) for n in (1, 2, 3, 4)])
    for name in ("log.txt", "log.jsonl"):
        content = (tmp_path / name).read_text()
        left = content[: cut % (len(content) + 1)]
        (tmp_path / name).write_text(left)
        whole = left[: left.rfind("\n") + 1].splitlines()
        log.keep_until(step)
        assert (tmp_path / name).read_text().splitlines() == whole[:step]


def _on_a_full_disk(folder: Path) -> tuple[list[str], str]:
    """No file may grow beyond a limit while steps 2 and 3 are logged: to a program that is a full disk. A job."""
    said: list[str] = []
    reporter = reporter_of(TextLog(), JsonLog(), Listener(said))
    reporter.start(info(folder))
    reporter.write([entry(1)])
    before = (folder / "log.txt").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        reporter.write([entry(2)])
        reporter.write([entry(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    during = (folder / "log.txt").read_text()
    assert during == before  # no part of a line
    reporter.write([entry(4)])
    return said, during


def test_lines_that_the_disk_refuses_wait_for_the_next_report(ranks: Pools, tmp_path: Path) -> None:
    ((said, _),) = ranks(1).run(_on_a_full_disk, tmp_path)
    refused = "cannot be written (File too large); its lines wait for the next report"
    assert said == [f"error: {tmp_path / name} {refused}" for _ in (2, 3) for name in ("log.txt", "log.jsonl")]
    assert [line.split()[0] for line in text_lines(tmp_path)] == ["1", "2", "3", "4"]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    log = Logs(tmp_path / "run")
    log.write([entry(1, loss=1.0)])
    shutil.rmtree(tmp_path / "run")
    log.write([entry(2, loss=2.0)])
    assert (tmp_path / "run" / "log.txt").read_text().startswith("2 train")


# Sinks of one's own.


class Listener(Sink):
    """Keeps what is said, and every record; ``refuses`` the first so many times."""

    def __init__(self, said: list[str], refuses: int = 0) -> None:
        self.said, self.refuses = said, refuses
        self.calls: list[Any] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def open(self, run: RunInfo) -> None:
        self.calls.append(("open", run.first_step))

    def resume(self, step: int) -> None:
        self.calls.append(("resume", step))

    def write(self, records: Sequence[Record]) -> None:
        if self.refuses:
            self.refuses -= 1
            raise RuntimeError("the server is away\nand more")
        self.calls.append([record["step"] for record in records])

    def close(self) -> None:
        self.calls.append("close")
        raise RuntimeError("cannot say goodbye")


def reporter_of(*sinks: Sink) -> Reporter:
    return Reporter(
        ParallelState.create(ParallelLayout(torch.distributed.get_world_size()), torch.device("cpu")), sinks
    )


def _fails(folder: Path) -> tuple[list[str], list[Any]]:
    said: list[str] = []
    failing = Listener(said, refuses=2)
    reporter = reporter_of(failing)
    reporter.add(JsonLog())
    reporter.start(RunInfo(folder, {}, first_step=3, max_steps=9, tokens_per_step=96))
    for step in (4, 5, 6, 7):
        reporter.write([entry(step)])
    reporter.close()
    return said, failing.calls


def test_a_sink_that_fails_loses_neither_lines_nor_the_run(ranks: Pools, tmp_path: Path) -> None:
    (said, calls), (nothing_said, uncalled) = ranks(2).run(_fails, tmp_path)
    assert said == ["error: the server is away; its lines wait for the next report"] * 2 + ["error: cannot say goodbye"]
    assert calls == [("open", 3), ("resume", 3), [4, 5, 6], [7], "close"]
    assert [record["step"] for record in records(tmp_path)] == [4, 5, 6, 7]  # of the sink after it
    assert (nothing_said, uncalled) == ([], [])  # only the master has sinks


class Misconfigured(Sink):
    def open(self, run: RunInfo) -> None:
        raise ConfigError("no such project")


def _cannot_open(folder: Path) -> str:
    try:
        reporter_of(Misconfigured()).start(info(folder))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_sink_that_cannot_begin_ends_the_run_before_it_begins(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(2).run(_cannot_open, tmp_path) == ["no such project"] * 2


def test_the_built_in_sinks_have_names() -> None:
    assert list(SINKS) == ["log", "jsonl", "csv", "messages", "tensorboard", "wandb", "console"]
    made = make_sinks(["console", "wandb", "log"])
    assert [type(sink) for sink in made] == [TextLog, Background, Console]


def test_messages_are_kept_with_their_time_over_all_starts(tmp_path: Path) -> None:
    for start, step in ((10.0, 0), (20.0, 3)):
        log = MessageLog(now=lambda start=start: start)
        log.say("early")
        log.open(replace(info(tmp_path), first_step=step))
        log.resume(step)
        log.advance(step + 1)
        log.say("line\nand more")
        with open(tmp_path / "messages.jsonl", "a") as file:
            file.write('{"time": 1, "st' * (step == 0))  # killed while writing
    entries = [json.loads(line) for line in (tmp_path / "messages.jsonl").read_text().splitlines()]
    assert [tuple(entry.values()) for entry in entries] == [
        *((10.0, 0, "early"), (10.0, 1, "line\nand more"), (20.0, 3, "early"), (20.0, 4, "line\nand more")),
    ]


def test_messages_that_cannot_be_kept_end_no_run(tmp_path: Path) -> None:
    (tmp_path / "messages.jsonl").mkdir()
    log = MessageLog()
    log.say("early")
    log.open(info(tmp_path))
    log.say("later")
    assert not list((tmp_path / "messages.jsonl").iterdir())


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    log = TextLog()
    log.open(info(tmp_path))
    with pytest.raises(StorageError, match=r"log.txt cannot be written \(Is a directory\)"):
        log.write([entry(1)])
