"""Progress: a bar on a terminal, few plain lines elsewhere, nothing for quick work."""

from __future__ import annotations

import io

import pytest

from tinytron.utils import progress
from tinytron.utils.progress import FIRST_LINE_SECONDS, LINE_SECONDS, Progress, scaled


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(seconds_per_update: float, updates: int, total: int | None, file: io.StringIO, **options: bool) -> list[str]:
    """The lines about work that makes 1000 bytes in every update."""
    now = 0.0
    with Progress("hashing", total, file=file, now=lambda: now, **options) as made:
        for _ in range(updates):
            now += seconds_per_update
            made.update(1000, "fast")
    return file.getvalue().splitlines()


def test_quick_work_shows_nothing() -> None:
    assert shown(FIRST_LINE_SECONDS / 20, 10, 10_000, io.StringIO()) == []
    assert shown(0.0, 10, 10_000, Terminal()) == []


def test_long_work_shows_plain_lines_at_intervals_without_a_terminal() -> None:
    lines = shown(5.0, 20, 20_000, io.StringIO())
    assert lines == [
        "hashing: 1.00kB of 20.0kB (5%), 01:35 left, fast",
        "hashing: 7.00kB of 20.0kB (35%), 01:05 left, fast",
        "hashing: 13.0kB of 20.0kB (65%), 00:35 left, fast",
        "hashing: 19.0kB of 20.0kB (95%), 00:05 left, fast",
    ]
    assert LINE_SECONDS == 30.0


def test_work_of_unknown_size_says_how_much_is_done() -> None:
    assert shown(5.0, 1, None, io.StringIO()) == ["hashing: 1.00kB, fast"]


def test_a_terminal_shows_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    terminal = Terminal()
    shown(5.0, 3, 4000, terminal)
    text = terminal.getvalue()
    assert "hashing" in text
    assert "B/s" in text
    assert "\n" not in text
    assert text.rsplit("\r", 2)[-2].strip() == text.rsplit("\r", 1)[-1].strip() == ""


def test_work_may_be_silent() -> None:
    assert shown(5.0, 20, 20_000, io.StringIO(), shown=False) == []
    assert shown(5.0, 20, 20_000, Terminal(), shown=False) == []


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (12, "B", "12B"),
        (1_630_000, "B", "1.63MB"),
        (1, "row", "1 row"),
        (0, "row", "0 rows"),
        (2500, "file", "2.50k files"),
    ],
)
def test_amounts_have_a_unit(count: int, unit: str, text: str) -> None:
    assert scaled(count, unit) == text
