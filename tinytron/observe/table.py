"""Runs as a table in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinytron.observe.curves import Curve, Name, means
from tinytron.observe.run import Run
from tinytron.utils.texts import counted, table

COLUMNS = (
    "run",
    "state",
    "step",
    "of",
    "loss",
    "loss over steps",
    "val loss",
    "lr",
    "grad norm",
    "tok/s",
    "MFU",
    "left",
)
RIGHT = (2, 3, 4, 6, 7, 8, 9, 10, 11)
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 16  # width of the small curve
EVENTS = 5  # the newest of each run
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def summary_table(runs: Sequence[Run]) -> list[str]:
    """The lines of a table with a row for each run (refreshed by the caller), then what happened last."""
    lines = table([COLUMNS, *(_row(run) for run in runs)], right=RIGHT)
    for run in runs:
        summary = run.summary()
        notes = [f"step {event.step}: {event.text}" for event in run.events()[-EVENTS:]]
        if summary["damaged"]:
            notes.append(f"{counted(summary['damaged'], 'damaged or half-written line')} passed over")
        if summary["problem"]:
            notes.append(summary["problem"])
        if notes:
            lines += ["", *(f"{clean(run.name)}: {clean(note)}" for note in notes)]
    return lines


def _row(run: Run) -> list[str]:
    summary = run.summary()
    loss = run.log.curves.get(Name("train", "loss"))
    return [
        clean(run.name),
        summary["state"],
        f"{summary['step']:,}",
        _number(summary["max_steps"], ","),
        _number(summary["loss"], ".4f"),
        sparkline(loss) if loss is not None else "",
        _number(summary["val_loss"], ".4f"),
        _number(run.last("lr"), ".2e"),
        _number(run.last("grad_norm"), ".3f"),
        _number(summary["tokens_per_second"], ",.0f"),
        _number(summary["mfu"], ".1%"),
        _left(summary["seconds_left"]),
    ]


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}" if minutes else "<1 min"


def sparkline(curve: Curve) -> str:
    """A curve in one line of text."""
    values = means(curve, WIDTH).values
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = values.min(), values.max()
    places = np.zeros(len(values)) if high == low else (values - low) / (high - low) * (len(BARS) - 1)
    return "".join(BARS[round(place)] for place in places.tolist())


def clean(text: str) -> str:
    """``text`` without characters that control a terminal."""
    return _CONTROL.sub("?", text)
