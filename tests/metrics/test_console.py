"""What a person sees: plain lines without a terminal, else a bar; and which numbers of a record."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tinytron.metrics.sinks import Console, RunInfo
from tinytron.metrics.sinks.console import shown, train_values


def console(max_steps: int, first_step: int) -> Console:
    """The console of a run that goes on after ``first_step``."""
    made = Console(now=lambda: time.perf_counter())
    made.open(RunInfo(Path(), {}, first_step, max_steps, tokens_per_step=96))
    return made


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, moved by assignment."""
    time_ = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: time_[0])
    return time_


def test_a_report_is_one_line_with_the_time_left(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    progress = console(1000, 100)
    now[0] += 30  # for 20 steps: 1.5 s each, 880 are left
    progress.advance(120)
    progress.show(120, {"loss": "2.5000", "lr": "1.00e-03"})
    progress.close()
    assert capsys.readouterr().out == "step  120/1000 | loss 2.5000 | lr 1.00e-03 | ETA 22:00\n"


def test_a_long_step_gives_a_line_a_minute(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    progress = console(20, 0)
    for step in range(2):
        for done in range(4):
            progress.advance_within_step(done, 4)
            now[0] += 40
        progress.advance(step + 1)
        now[0] += 300  # saving
    assert capsys.readouterr().out.splitlines() == [
        "step  1/20 | micro-batch 1/4, 00:40 so far",
        "step  1/20 | micro-batch 3/4, 02:00 so far",
        "step  2/20 | micro-batch 1/4, 00:40 so far",
        "step  2/20 | micro-batch 3/4, 02:00 so far",
    ]
    progress.advance_within_step(0, 4)
    now[0] += 4.9
    progress.advance_within_step(1, 4)  # a short step says nothing
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3600, "1:00:00"), (360061, "100:01:01")]
)
def test_the_time_left_is_readable(
    capsys: pytest.CaptureFixture[str], now: list[float], seconds: float, shown: str
) -> None:
    progress = console(2, 0)
    now[0] += seconds
    progress.show(1, {})
    assert capsys.readouterr().out.endswith(f"ETA {shown}\n")


def test_a_report_before_the_first_step_does_not_divide_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    console(10, 4).show(4, {"loss": "1"})
    assert re.fullmatch(r"step  4/10 \| loss 1 \| ETA 00:00\n", capsys.readouterr().out)


def test_messages_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console(10, 0).say("saved")
    assert capsys.readouterr().out == "saved\n"


class Terminal(io.StringIO):
    """A terminal, on which a bar is drawn."""

    def isatty(self) -> bool:
        return True


def test_a_bar_moves_within_a_long_step(monkeypatch: pytest.MonkeyPatch, now: list[float]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = console(10, 4)
    progress.advance_within_step(0, 8)
    now[0] += 6
    progress.advance_within_step(3, 8)
    assert "micro-batch 3/8" in terminal.getvalue().rpartition("\r")[2]
    now[0] += 1
    progress.advance(5)
    progress.close()
    last = terminal.getvalue().rpartition("\r")[2]
    assert "5/10" in last
    assert "micro-batch" not in last


def test_a_terminal_gets_a_bar_and_messages_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = console(10, 4)
    progress.advance(7)
    progress.show(7, {"loss": "2.5"})
    progress.say("saved")
    progress.close()
    bar = terminal.getvalue()
    assert "7/10" in bar
    assert "loss=2.5" in bar
    assert capsys.readouterr().out.strip() == "saved"


def record(step: int, **more: Any) -> dict[str, Any]:
    values = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.25, "tokens_per_second": 4800.0, "mfu": 0.5, "skipped_steps": 0}
    return {"step": step, "stage": "train", **values, **more}


def test_a_report_shows_its_last_step_and_every_result(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    made = console(9, 0)
    made.write([record(1), record(2)])
    val = {"loss": 2.0, "perplexity": 7.4, "tokens": 1234}
    made.write([{"step": 2, "stage": "val", **val}, {"step": 2, "stage": "val", **val, "bits_per_byte": 1.5}])
    assert capsys.readouterr().out.splitlines() == [
        "step 2/9 | loss 2.5000 | lr 1.00e-03 | grad norm 0.250 | ms 20 | tok/s 4,800 | MFU 50.0% | ETA 00:00",
        "step 2 | val loss 2.0000 over 1,234 tokens",
        "step 2 | val loss 2.0000 (1.5000 bits per byte) over 1,234 tokens",
    ]


def test_what_is_rare_is_shown_when_it_is_there() -> None:
    layers = [{"max_violation": 0.5}, {"max_violation": 1.25}]
    margins = [{"min": 1e-3}, {"min": 1e-5}]
    values = train_values(record(1, skipped_steps=3, expert_load=layers, router_margin=margins), 96)
    assert {name: values[name] for name in ("skipped", "max load", "min margin")} == {
        "skipped": "3", "max load": "2.25x", "min margin": "1.0e-05",
    }  # fmt: skip
    assert not {"skipped", "max load", "min margin"} & train_values(record(1), 96).keys()


def test_a_task_is_one_line() -> None:
    scores = {"accuracy": 0.5, "accuracy_stderr": 0.125, "accuracy_per_byte": 0.25, "items": 16}
    line = shown({"step": 3, "stage": "eval", "task": "sky", **scores})
    assert line == "sky: accuracy 0.5000 ± 0.1250 (0.2500 per byte) over 16 items"
