"""Records as flat numbers by name, for sinks that know nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinytron.metrics.sinks.base import Record

_OF_RECORD = ("step", "stage", "task")  # say where numbers belong, and are none themselves


def flat_record(record: Record) -> dict[str, float]:
    """The numbers of a record by names that begin with its stage and, for an evaluation, the task: ``train/loss``,
    ``train/sources/web/loss``, ``train/expert_load/0/entropy`` (of block 0), ``eval/sst2/score``. Texts and lists of
    numbers are left out."""
    stage, task = record["stage"], record.get("task")
    prefix = stage if task is None else f"{stage}/{task}"
    return dict(_numbers(prefix, {name: value for name, value in record.items() if name not in _OF_RECORD}))


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        yield prefix, int(value)
    elif isinstance(value, int | float):
        yield prefix, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(f"{prefix}/{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict) and "layer" in inner:
                own = {name: number for name, number in inner.items() if name != "layer"}
                yield from _numbers(f"{prefix}/{inner['layer']}", own)
