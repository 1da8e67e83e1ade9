"""What a person sees: plain lines without a terminal, nothing from other ranks."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from tinytron.metrics import Progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, moved by assignment."""
    time_ = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: time_[0])
    return time_


def test_a_report_is_one_line_with_the_time_left(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    progress = Progress(1000, 100, enabled=True)
    now[0] += 30  # for 20 steps: 1.5 s each, 880 are left
    progress.advance(120)
    progress.report(120, {"loss": "2.5000", "lr": "1.00e-03"})
    progress.close()
    assert capsys.readouterr().out == "step  120/1000 | loss 2.5000 | lr 1.00e-03 | ETA 22:00\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3600, "1:00:00"), (360061, "100:01:01")]
)
def test_the_time_left_is_readable(
    capsys: pytest.CaptureFixture[str], now: list[float], seconds: float, shown: str
) -> None:
    progress = Progress(2, 0, enabled=True)
    now[0] += seconds
    progress.report(1, {})
    assert capsys.readouterr().out.endswith(f"ETA {shown}\n")


def test_a_report_before_the_first_step_does_not_divide_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(10, 4, enabled=True).report(4, {"loss": "1"})
    assert re.fullmatch(r"step  4/10 \| loss 1 \| ETA 00:00\n", capsys.readouterr().out)


def test_messages_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(10, 0, enabled=True).message("saved")
    assert capsys.readouterr().out == "saved\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, 0, enabled=False)
    progress.advance(3)
    progress.report(3, {"loss": "1"})
    progress.message("saved")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_messages_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(10, 4, enabled=True)
    progress.advance(7)
    progress.report(7, {"loss": "2.5"})
    progress.message("saved")
    progress.close()
    shown = terminal.getvalue()
    assert "7/10" in shown
    assert "loss=2.5" in shown
    assert capsys.readouterr().out.strip() == "saved"
    silent = Progress(10, 4, enabled=False)
    silent.advance(5)
    silent.close()
    assert terminal.getvalue() == shown
