"""Curves of a log: where a number is drawn, and how a long curve becomes a short one that shows the same."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

_LAGGING = re.compile(r"(.+_back)_(\d+)")
Array = np.ndarray[Any, np.dtype[np.float64]]


class Name(NamedTuple):
    """The identity of a curve: the stage of its records, and its key in them (``/`` between the keys of nested values)."""

    stage: str
    key: str

    @property
    def place(self) -> tuple[str, str]:
        """The chart of the curve, and its name within the chart: ``grad_norms/a.weight`` is ``a.weight`` in the chart
        ``grad_norms``, and ``sources/wiki/loss`` is ``wiki`` in ``sources/loss``. A key without ``/`` has its own chart.
        Of a lagging evaluation, ``eval/lagging/loss_back_16`` is ``16 steps ago`` in ``eval/loss_back``."""
        first, *inner = self.key.split("/")
        if inner and (lagging := _LAGGING.fullmatch(inner[-1])) is not None:
            return f"{first}/{lagging[1]}", f"{lagging[2]} {'step' if lagging[2] == '1' else 'steps'} ago"
        if not inner:
            return first, ""
        if len(inner) == 1:
            return first, inner[0]
        return f"{first}/{inner[-1]}", "/".join(inner[:-1])


class Curve(NamedTuple):
    """Steps in ascending order, and a value for each, which may be NaN or infinite."""

    steps: Array
    values: Array


def between(curve: Curve, first: float, last: float) -> Curve:
    """The points from step ``first`` to ``last``, and one more at each end, so that lines reach the edges of a chart."""
    start = max(0, int(np.searchsorted(curve.steps, first)) - 1)
    end = int(np.searchsorted(curve.steps, last, side="right")) + 1
    return Curve(curve.steps[start:end], curve.values[start:end])


def merged(parts: list[Curve]) -> Curve:
    """One curve from parts in the order of the log. A step that is there twice has its last value: a run that went back
    wrote it again."""
    steps, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(steps) > 1 and not np.all(np.diff(steps) > 0):
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return Curve(steps, values)


def extremes(curve: Curve, buckets: int) -> Curve:
    """At most ``2 * buckets + 2`` points: the first, the last, and of each of ``buckets`` equal parts the lowest and the
    highest, so that a spike of one step stays visible."""
    count = len(curve.steps)
    if count <= 2 * buckets + 2:
        return curve
    values_BW = _padded(curve.values, buckets)
    finite_BW = np.isfinite(values_BW)
    start_B = np.arange(buckets) * values_BW.shape[1]
    low_B = start_B + np.where(finite_BW, values_BW, np.inf).argmin(1)
    high_B = start_B + np.where(finite_BW, values_BW, -np.inf).argmax(1)
    kept = np.unique(np.concatenate([[0], low_B, high_B, [count - 1]]).clip(max=count - 1))
    return Curve(curve.steps[kept], curve.values[kept])


def means(curve: Curve, buckets: int) -> Curve:
    """At most ``buckets`` points, each the mean of the finite values of one of equal parts, at their last step."""
    count = len(curve.steps)
    if count <= buckets:
        return curve
    values_BW = _padded(curve.values, buckets)
    finite_BW = np.isfinite(values_BW)
    total_B = np.where(finite_BW, values_BW, 0.0).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_B = total_B / finite_BW.sum(1)
    last_B = np.minimum((np.arange(buckets) + 1) * values_BW.shape[1], count) - 1
    used = np.arange(buckets) * values_BW.shape[1] < count
    return Curve(curve.steps[last_B[used]], mean_B[used])


def _padded(values: Array, buckets: int) -> Array:
    """``values`` as ``buckets`` rows of equal length, with NaN after the last."""
    width = -(-len(values) // buckets)
    padded = np.full(buckets * width, np.nan)
    padded[: len(values)] = values
    return padded.reshape(buckets, width)


def as_json(values: Array) -> list[float | int | None]:
    """Numbers for JSON with seven significant digits, more than a screen shows; ``None`` for those that are not finite."""
    return [None if number != number or number in (np.inf, -np.inf) else _short(number) for number in values.tolist()]


def _short(number: float) -> float | int:
    return int(number) if number.is_integer() and abs(number) < 2**53 else float(f"{number:.7g}")
