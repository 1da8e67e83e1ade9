"""From the lines of a log.jsonl to columns of numbers. A damaged or half-written line is counted and passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinytron.observe.curves import Curve, Name

LOAD = "expert_load"  # its ``fractions`` become a heat map
MAX_STEP = 2**53  # larger numbers are not exact as floats
MAX_LIST = 256  # entries that are read of a list
SHOWN_TEXT = 4000  # characters
MAX_TEXTS = 50  # the newest of a block


class Text(NamedTuple):
    """A text in a record, such as a generated sample."""

    step: int
    name: str
    text: str


@dataclass
class Block:
    """The contents of some lines: curves, the experts' shares by layer as (step, shares), texts, and counts of lines.

    ``steps`` are the first and the last training step, in the order of the lines, and ``turns`` the pairs of training steps
    that follow each other although the second one is not later: a run went back there."""

    curves: dict[Name, Curve] = field(default_factory=dict)
    loads: dict[str, list[tuple[int, list[float]]]] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    lines: int = 0
    damaged: int = 0
    steps: tuple[int, int] | None = None
    turns: list[tuple[int, int]] = field(default_factory=list)


def parse(content: bytes) -> Block:
    """The block of whole lines ``content``."""
    lines = [line for line in content.decode("utf-8", "replace").split("\n") if line and not line.isspace()]
    block = Block(lines=len(lines))
    groups: dict[tuple[str, ...], list[list[Any]]] = {}
    for record in _records(lines):
        if record is None:
            block.damaged += 1
        else:
            if record["stage"] == "train":
                _follow(block, record["step"])
            groups.setdefault((record["stage"], *record), []).append(list(record.values()))
    found: dict[Name, list[Curve]] = {}
    for (stage, *keys), rows in groups.items():
        columns = dict(zip(keys, zip(*rows, strict=True), strict=True))
        steps = np.array(columns.pop("step"), dtype=np.float64)
        del columns["stage"]
        tasks = columns.pop("task", None) if stage == "eval" else None
        for key, column in columns.items():
            for inner, curve in _curves(block, stage, key, steps, column, tasks):
                found.setdefault(Name(stage, inner), []).append(curve)
    block.curves = {name: _in_order(parts) for name, parts in found.items()}
    del block.texts[:-MAX_TEXTS]
    return block


def _follow(block: Block, step: int) -> None:
    if block.steps is None:
        block.steps = (step, step)
        return
    first, last = block.steps
    if step <= last:
        block.turns.append((last, step))
    block.steps = (first, step)


def _in_order(parts: list[Curve]) -> Curve:
    """Parts from records with different keys, by step. Repeated steps stay, in the order of the log where it is known."""
    if len(parts) == 1:
        return parts[0]
    steps, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(steps, kind="stable")
    return Curve(steps[order], values[order])


def _records(lines: list[str]) -> Iterator[dict[str, Any] | None]:
    """The record of each line, ``None`` for a damaged one."""
    try:  # all at once, which takes two thirds of the time
        records = json.loads(f"[{','.join(lines)}]")
    except (ValueError, RecursionError):
        records = []
    if len(records) != len(lines):
        records = [_record(line) for line in lines]
    for record in records:
        yield record if _is_record(record) else None


def _record(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("stage"), str):
        return False
    return type(step := record.get("step")) is int and 0 <= step < MAX_STEP


def _curves(
    block: Block, stage: str, key: str, steps: Any, column: Sequence[Any], tasks: Sequence[Any] | None
) -> Iterator[tuple[str, Curve]]:
    """The curves of one key, which are several if its values are nested or belong to several tasks."""
    if tasks is None and set(map(type, column)) <= {int, float}:
        try:
            yield key, Curve(steps, np.array(column, dtype=np.float64))
            return
        except OverflowError:  # a whole number of more than 308 digits
            pass
    scattered: dict[str, tuple[list[float], list[float]]] = {}
    for place, (step, value) in enumerate(zip(steps.tolist(), column, strict=True)):
        prefix = key if tasks is None else f"{tasks[place]}/{key}"
        for name, inner in _leaves(prefix, value):
            if isinstance(inner, list):
                block.loads.setdefault(name.split("/")[-2], []).append((int(step), inner))
            elif isinstance(inner, str):
                block.texts.append(Text(int(step), name, inner[:SHOWN_TEXT]))
            else:
                at, values = scattered.setdefault(name if tasks is None else f"eval/{name}", ([], []))
                at.append(step)
                values.append(inner)
    for name, (at, values) in scattered.items():
        yield name, Curve(np.array(at), np.array(values))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float | str | list[float]]]:
    """Numbers, texts and experts' shares in ``value``, with their names."""
    if isinstance(value, dict):
        layer = value.get("layer")
        for key, inner in value.items():
            shares = key == "fractions" and name.startswith(LOAD) and isinstance(inner, list)
            if shares and inner and all(type(share) in (int, float) for share in inner):
                yield f"{name}/{key}", inner
            elif not (key == "layer" and type(layer) is int):
                yield from _leaves(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value[:MAX_LIST]):
            layer = inner.get("layer") if isinstance(inner, dict) else None
            yield from _leaves(f"{name}/{f'layer {layer}' if type(layer) is int else number}", inner)
    elif isinstance(value, int | float):
        yield name, _number(value)
    elif isinstance(value, str):
        if value in ("nan", "inf", "-inf"):  # JSON lacks these numbers, so logs have them as text
            yield name, float(value)
        else:
            yield name, value


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")
