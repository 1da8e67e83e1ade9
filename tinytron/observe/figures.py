"""Curves as pictures for papers and slides, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinytron.errors import ConfigError
from tinytron.observe.curves import Array, Curve, extremes
from tinytron.observe.run import POINTS, Run
from tinytron.utils.flags import nearest
from tinytron.utils.optional import require_package

FORMATS = (".png", ".pdf", ".svg")
USUAL = ("loss", "grad_norm")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f6672", "#7a4fa3")  # after Okabe and Ito
LABELS = {
    "loss": "loss [nats per token]",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
    "mfu": "MFU",
}
SMOOTHED = ("loss", "grad_norm")
WEIGHT = 0.9  # smoothing: the share of the average that each point keeps
DPI = 200
PANEL = (4.2, 2.9)  # inches


def save_figures(runs: Sequence[Run], path: Path, charts: Sequence[str] = ()) -> None:
    """Draw ``charts`` (default: those of ``USUAL`` that there are) of ``runs`` and save them in the format that the name of
    ``path`` has. Raises: ConfigError without matplotlib, without curves, and for an unknown chart."""
    known = sorted({name.place[0] for run in runs for name in run.log.curves})
    if not known:
        raise ConfigError(f"{runs[0].name} has no curves yet; wait for its first report (--log_every)")
    for chart in charts:
        if chart not in known:
            raise ConfigError(
                f"--curves {chart} is not in the logs{nearest(chart, known)}; use any of {', '.join(known)}"
            )
    wanted = list(charts) or [chart for chart in USUAL if chart in known] or known[:4]
    matplotlib = require_package("matplotlib", "report")
    figures = require_package("matplotlib.figure", "report")
    columns = min(2, len(wanted))
    rows = -(-len(wanted) // columns)
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}
    ):
        figure = figures.Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for chart, axis in zip(wanted, axes, strict=False):
            _draw(axis, runs, chart)
        for axis in axes[len(wanted) :]:
            axis.set_visible(False)
        figure.savefig(path, dpi=DPI)


def _draw(axis: Any, runs: Sequence[Run], chart: str) -> None:
    number = 0
    stages = {name.stage for run in runs for name in run.log.curves if name.place[0] == chart}
    for place, run in enumerate(runs):
        for name, curve in run.log.curves.items():
            if name.place[0] != chart or not len(curve.steps):
                continue
            color = COLORS[(place if len(runs) > 1 else number) % len(COLORS)]
            stage = {"train": "training", "val": "validation"}.get(name.stage, "") if len(stages) > 1 else ""
            label = " ".join(filter(None, [run.name if len(runs) > 1 else "", name.place[1], stage]))
            few = extremes(curve, POINTS)
            if name.stage != "train":
                dashed = "--" if len(runs) > 1 else "-"
                axis.plot(*few, dashed, color=color, marker="o", markersize=3, linewidth=1.2, label=label)
            elif chart in SMOOTHED and len(curve.steps) > 20:
                axis.plot(*few, color=color, alpha=0.25, linewidth=0.7)
                axis.plot(
                    *extremes(Curve(curve.steps, smoothed(curve.values)), POINTS),
                    color=color,
                    linewidth=1.4,
                    label=label,
                )
            else:
                axis.plot(*few, color=color, linewidth=1.4, label=label)
            number += 1
    axis.set(xlabel="step", ylabel=LABELS.get(chart, chart.replace("_", " ")))
    axis.grid(alpha=0.25, linewidth=0.6)
    if 1 < number <= 12:
        axis.legend(edgecolor="none", framealpha=0.8, fontsize=8)


def smoothed(values: Array) -> Array:
    """An exponential average of the finite values, corrected for its start."""
    found, total, norm = np.full(len(values), np.nan), 0.0, 0.0
    for place, value in enumerate(values.tolist()):
        if np.isfinite(value):
            total, norm = WEIGHT * total + (1 - WEIGHT) * value, WEIGHT * norm + (1 - WEIGHT)
            found[place] = total / norm
    return found
