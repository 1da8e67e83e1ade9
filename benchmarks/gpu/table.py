"""The table at the end: what is wrong, what misses its target, what was not run, what is right; and the advice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu import parts
from gpu.advice import advice
from gpu.pool import VERDICT, WORKING, Verdict
from gpu.targets import TARGETS, Target

MAX_LINES = 60
MAX_WRONG_OF_PART = 3  # or one part, in which the GPU broke down, would hide the others
MAX_WRONG = 20  # lines on what is wrong; the rest is counted
WIDTH = 150


@dataclass
class Outcome:
    """What one part left behind; ``verdict`` is ``None`` where it has not run, or was stopped."""

    name: str
    verdict: str | None = None
    seconds: float = 0.0
    code: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_outcome(folder: Path, name: str) -> Outcome:
    """The outcome of a part; one that was cut short keeps the figures that it had by then."""
    found = Outcome(name)
    for place in (folder / name, folder / WORKING / name):
        if place.is_dir():
            result = _json(place / "result.json")
            found.figures, found.problems = result.get("figures", {}), result.get("problems", {})
            found.notes = result.get("notes", [])
            verdict = _json(place / VERDICT)
            found.verdict, found.seconds = verdict.get("verdict"), verdict.get("seconds", 0.0)
            found.code = verdict.get("code", "")
            break
    return found


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def outcomes(folder: Path) -> list[Outcome]:
    """Those of all parts, in their order."""
    return [read_outcome(folder, part.name) for part in parts.PARTS]


def figures_of(found: list[Outcome]) -> dict[str, float]:
    """All figures by name."""
    return {name: value for outcome in found for name, value in outcome.figures.items()}


def wrong_lines(found: list[Outcome]) -> Iterator[str]:
    """A line for every check that failed, and for every part that did."""
    for outcome in found:
        wrong = [f"{name}: {problem}" for name, problem in outcome.problems.items() if problem]
        for text in wrong[:MAX_WRONG_OF_PART]:
            yield _cut(f"WRONG    {outcome.name}: {text}")
        if len(wrong) > MAX_WRONG_OF_PART:
            yield f"WRONG    {outcome.name}: {len(wrong) - MAX_WRONG_OF_PART} more checks, see its log.txt"
        if outcome.verdict == Verdict.FAILED and not any(outcome.problems.values()):
            yield f"FAILED   {outcome.name}: see {outcome.name}/log.txt; once mended: --again {outcome.name}"
        if outcome.verdict == Verdict.TIMED_OUT:
            yield f"TOO LONG {outcome.name}: stopped after {outcome.seconds:.0f} s; see {outcome.name}/log.txt"


def left_out_lines(found: list[Outcome]) -> Iterator[str]:
    """A line for every part that could not run here, and for what other parts had to leave out."""
    for outcome in found:
        if outcome.verdict == Verdict.LEFT_OUT:
            yield _cut(f"LEFT OUT {outcome.name}: {outcome.notes[-1] if outcome.notes else 'see its log'}")
            continue
        for note in outcome.notes:
            if note.startswith("left out: "):
                yield _cut(f"LEFT OUT {outcome.name}: {note.removeprefix('left out: ')}; then --again {outcome.name}")


def _cut(text: str) -> str:
    line = " ".join(text.splitlines())
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def target_lines(figures: dict[str, float]) -> tuple[list[str], list[str], list[str]]:
    """Lines on targets that are missed (the worst first), not run, and met."""
    missed: list[tuple[float, str]] = []
    not_run: list[str] = []
    met: list[str] = []
    for target in TARGETS:
        if target.figure not in figures:
            not_run.append(target.figure)
            continue
        value = figures[target.figure]
        line = f"{target.what}: {value:{target.form}} ({_bound(target)})"
        if target.met(value):
            met.append(f"met      {line}")
        else:
            by = target.missed_by(value)
            missed.append((math.inf if math.isnan(by) else by, f"MISSED   {line}, by {by:.0%}"))
    missed.sort(key=lambda row: -row[0])
    return [line for _, line in missed], not_run, met


def _bound(target: Target) -> str:
    return f"{'at most' if target.at_most else 'at least'} {target.bound:{target.form}}"


def part_lines(found: list[Outcome]) -> Iterator[str]:
    """A line for every part that ended well."""
    for outcome in found:
        if outcome.verdict == Verdict.DONE and not any(outcome.problems.values()):
            note = f": {outcome.notes[-1]}" if outcome.notes else ""
            checks = f", {len(outcome.problems)} checks right" if outcome.problems else ""
            yield _cut(f"done     {outcome.name} in {outcome.seconds:.0f} s{checks}{note}")


def report_lines(folder: Path) -> list[str]:
    """The whole table, at most ``MAX_LINES`` lines, the worst first."""
    found = outcomes(folder)
    figures = figures_of(found)
    wrong = list(wrong_lines(found))
    missed, targets_not_run, met = target_lines(figures)
    waiting = [outcome.name for outcome in found if outcome.verdict is None]
    code = sorted({outcome.code for outcome in found if outcome.code})
    about = _json(folder / "machine.json")
    lines = [f"{about.get('gpu')}, torch {about.get('torch')}, code {', '.join(code) or 'unknown'}: {folder}"]
    lines += [*wrong[:MAX_WRONG], *([f"         and {len(wrong) - MAX_WRONG} more"] if len(wrong) > MAX_WRONG else [])]
    if about.get("rehearsal"):
        count = len(TARGETS) - len(targets_not_run)
        missed, met = [], [f"{count} of {len(TARGETS)} targets have a figure; a rehearsal's figures mean nothing"]
    lines += [*missed, *left_out_lines(found)]
    if waiting:
        lines.append(_cut(f"NOT RUN  call again for {', '.join(waiting)}"))
    if targets_not_run:
        lines.append(_cut(f"NOT RUN  targets: {', '.join(targets_not_run)}"))
    lines += [*met, *part_lines(found)]
    if not about.get("rehearsal"):
        lines += advice(figures)
    if len(lines) > MAX_LINES:
        lines = [
            *lines[: MAX_LINES - 1],
            f"... and {len(lines) - MAX_LINES + 1} more lines; all figures are in {folder}",
        ]
    return lines


def something_is_wrong(folder: Path) -> bool:
    """Whether a check or a part failed. A missed target is slow, not wrong."""
    return any(True for _ in wrong_lines(outcomes(folder)))
