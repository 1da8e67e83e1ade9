"""Events of a run (spikes, skipped steps, resumes, ...), found in its log and the other files of its folder."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tinytron.observe.curves import Array, Curve, Name
from tinytron.observe.folder import CONFIG, LOG, FileInfo
from tinytron.utils.texts import counted

WINDOW = 50  # steps before a spike
SIGMAS = 6.0  # above the mean of the window
LEAST_RISE = 0.02  # relative to the mean: in a smooth loss even a tiny rise is many standard deviations
LISTED = 25  # events of a kind; of more, the largest spikes or the first
KEPT_LOG = re.compile(re.escape(LOG) + r"\.(\d+)")
RESUME = re.compile(r"resuming after step (\d+) from ")
BACK = re.compile(r"step (\d+) \| (back to the checkpoint of step (\d+), .*)")
STOP = re.compile(r"step (\d+) \| (stopped by .*)")
STALL = re.compile(r"^rank \d+: no step completed for .*, after step (\d+);.*$", re.MULTILINE)


class Message(NamedTuple):
    """A line that the run printed: seconds since 1970, the step that was complete, and the text."""

    time: float
    step: int
    text: str


class Event(NamedTuple):
    """Something that happened after ``step``. ``kind``: spike, not finite, skipped, went back, resumed, stalled, stopped,
    error or finished."""

    step: int
    kind: str
    text: str


def events_of_curves(curves: Mapping[Name, Curve]) -> list[Event]:
    """Spikes of the training loss, values that are not finite, and skipped steps."""
    found: list[Event] = []
    for key in ("loss", "grad_norm"):
        if (curve := curves.get(Name("train", key))) is not None:
            found += _not_finite(key.replace("_", " "), curve)
    if (loss := curves.get(Name("train", "loss"))) is not None:
        found += spikes(loss)
    if (skipped := curves.get(Name("train", "skipped_steps"))) is not None:
        found += _skips(skipped)
    return found


def spikes(loss: Curve) -> list[Event]:
    """Steps whose loss is more than ``SIGMAS`` standard deviations above the mean of the ``WINDOW`` finite values before;
    of adjacent ones the highest."""
    finite = np.isfinite(loss.values)
    steps, values = loss.steps[finite], loss.values[finite]
    if len(values) <= WINDOW:
        return []
    centered = values - values.mean()  # sums of squares are exact enough then
    means, squares = (_window_means(x) for x in (centered, centered**2))
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    means = means + values.mean()
    late = values[WINDOW:]
    above = (late > means + SIGMAS * deviations) & (late - means > LEAST_RISE * np.abs(means))
    tops = [max(group, key=lambda n: late[n]) for group in _groups(np.flatnonzero(above).tolist())]
    tops = sorted(sorted(tops, key=lambda n: means[n] - late[n])[:LISTED])
    return [
        Event(
            int(steps[WINDOW + n]),
            "spike",
            f"the loss rose to {late[n]:.4g}; the mean of the {WINDOW} values before is {means[n]:.4g}",
        )
        for n in tops
    ]


def _window_means(values: Array) -> Array:
    """The mean of the ``WINDOW`` values before each value but the first ones."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: Array = (sums[WINDOW:-1] - sums[: -WINDOW - 1]) / WINDOW
    return means


def _groups(places: Iterable[int]) -> Iterator[list[int]]:
    """Runs of places that are at most three apart."""
    group: list[int] = []
    for place in places:
        if group and place - group[-1] > 3:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _not_finite(name: str, curve: Curve) -> list[Event]:
    groups = list(_groups(np.flatnonzero(~np.isfinite(curve.values)).tolist()))
    found = []
    for group in groups[:LISTED]:
        first, last = int(curve.steps[group[0]]), int(curve.steps[group[-1]])
        where = "" if first == last else f" ({counted(len(group), 'value')} up to step {last})"
        found.append(Event(first, "not finite", f"the {name} was {curve.values[group[0]]}{where}"))
    if len(groups) > LISTED:
        found.append(
            Event(int(curve.steps[groups[LISTED][0]]), "not finite", f"the {name} was so more often from here on")
        )
    return found


def _skips(skipped: Curve) -> list[Event]:
    """The reports in which the count of skipped steps rose. It is cumulative, and starts again with the process."""
    before = np.concatenate([[0.0], skipped.values[:-1]])
    rises = np.flatnonzero((skipped.values > before) & np.isfinite(before)).tolist()
    found = []
    for n in rises[:LISTED]:
        steps = counted(int(skipped.values[n] - before[n]), "step")
        found.append(Event(int(skipped.steps[n]), "skipped", f"{steps} skipped ({int(skipped.values[n])} in all)"))
    if len(rises) > LISTED:
        total = int(skipped.values[-1])
        found.append(Event(int(skipped.steps[-1]), "skipped", f"{counted(total, 'step')} skipped up to here"))
    return found


def events_of_log(turns: Iterable[tuple[int, int]]) -> list[Event]:
    """Places where the log goes back."""
    return [
        Event(step, "went back", f"after step {last} the log continues with step {step}; the later lines hold")
        for last, step in list(turns)[:LISTED]
    ]


def events_of_rewrites(rewrites: Iterable[int]) -> list[Event]:
    """Resumes and returns that were noticed because they cut the log."""
    return [
        Event(step, "resumed", f"the log had reached step {step} and was cut back to an earlier one")
        for step in list(rewrites)[-LISTED:]
    ]


def events_of_messages(messages: Iterable[Message]) -> list[Event]:
    """Resumes, returns after a spike, stops by a signal, and errors."""
    found = []
    for message in messages:
        if resumed := RESUME.match(message.text):
            found.append(
                Event(int(resumed[1]), "resumed", f"the run continued after step {resumed[1]}, {_at(message)}")
            )
        elif back := BACK.match(message.text):
            found.append(
                Event(int(back[3]), "went back", f"after step {back[1]} the run went {back[2]} ({_at(message)})")
            )
        elif stopped := STOP.match(message.text):
            found.append(Event(int(stopped[1]), "stopped", f"{stopped[2]} ({_at(message)})"))
        elif message.text.startswith("error: "):
            found.append(Event(message.step, "error", f"{message.text.removeprefix('error: ')} ({_at(message)})"))
    return found[-LISTED:]


def _at(message: Message) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(message.time))


def events_of_files(files: Mapping[str, FileInfo], stacks: Iterable[str]) -> list[Event]:
    """Stalls, and logs that were set aside."""
    found = []
    for name in sorted(files):
        if KEPT_LOG.fullmatch(name):
            found.append(Event(0, "resumed", f"an earlier log of this folder was set aside as {name}"))
    for text in stacks:
        found += [Event(int(match[1]), "stalled", match[0][:300]) for match in list(STALL.finditer(text))[:LISTED]]
    return found


def last_resume(files: Mapping[str, FileInfo], checkpoints: Iterable[tuple[int, float | None]]) -> list[Event]:
    """The last resume of a run without messages: it wrote config.json after the checkpoint that it loaded.
    ``checkpoints`` are steps, and when they were written."""
    started = files[CONFIG].written if CONFIG in files else None
    older = [step for step, written in checkpoints if started and written and written < started]
    return [Event(max(older), "resumed", f"the last start continued after step {max(older)}")] if older else []
