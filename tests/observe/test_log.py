"""Reading logs: in any blocks, while they grow, after a resume, and damaged; and shortening curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.run_folders import experts, lines, records
from tinytron.metrics.sinks.files import JsonLog, keep_lines
from tinytron.observe.curves import Curve, Name, as_json, between, extremes, means
from tinytron.observe.folder import LOG, LocalFolder
from tinytron.observe.log import LogReader, _spread
from tinytron.observe.records import parse

LOSS = Name("train", "loss")


def reader(folder: Path, block_bytes: int = 2**18) -> LogReader:
    return LogReader(LocalFolder(folder), block_bytes=block_bytes)


def refresh(log: LogReader, folder: Path, seconds: float = float("inf")) -> bool:
    return log.refresh((folder / LOG).stat().st_size, seconds)


def naive(entries: list[dict[str, Any]]) -> dict[Name, dict[int, float]]:
    """Flat numbers by curve and step; the last value of a step holds."""
    found: dict[Name, dict[int, float]] = {}
    for entry in entries:
        for key, value in entry.items():
            if key not in ("step", "stage"):
                found.setdefault(Name(entry["stage"], key), {})[entry["step"]] = float(value)
    return found


def as_dict(curve: Curve) -> dict[int, float]:
    return dict(zip(curve.steps.astype(int).tolist(), curve.values.tolist(), strict=True))


def test_the_log_has_the_name_that_a_run_gives_it() -> None:
    assert JsonLog.name == LOG


@pytest.mark.parametrize("block_bytes", [1, 50, 181, 182, 183, 1000, 10**6])
def test_blocks_of_any_size_hold_every_line_once(block_bytes: int, tmp_path: Path) -> None:
    entries = records(60)
    entries[7]["loss"] = 1e-300
    (tmp_path / LOG).write_text(lines(entries))
    log = reader(tmp_path, block_bytes)
    assert refresh(log, tmp_path)
    assert log.counts == (len(entries), 0)
    assert {name: as_dict(curve) for name, curve in log.curves.items()} == naive(entries)
    assert log.turns == []
    assert log.read_bytes == log.total_bytes == (tmp_path / LOG).stat().st_size


def test_the_first_blocks_are_spread_over_the_log(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(lines(records(4000)))
    log = reader(tmp_path, 2000)
    while log.read_bytes < 40_000:
        refresh(log, tmp_path, 0.0)
    steps = as_dict(log.curves[LOSS]).keys()
    assert len(steps) < 1000
    assert max(steps) == 4000
    assert min(steps) == 1
    assert np.diff(sorted(steps)).max() < 4000 / 8
    assert not log.complete
    assert refresh(log, tmp_path)
    assert len(log.curves[LOSS].steps) == 4000
    assert sorted(_spread(13)) == list(range(13))
    assert _spread(8) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_a_growing_log_is_followed_and_a_half_written_line_waits(tmp_path: Path) -> None:
    text = lines(records(20))
    (tmp_path / LOG).write_text(text[:-30])
    log = reader(tmp_path)
    refresh(log, tmp_path)
    assert log.unfinished
    assert log.counts == (21, 0)
    (tmp_path / LOG).write_text(text)
    refresh(log, tmp_path)
    assert not log.unfinished
    (tmp_path / LOG).write_text(text + lines(records(5, first=21)))
    version = log.version
    refresh(log, tmp_path)
    assert log.version > version
    assert as_dict(log.curves[LOSS]) == naive(records(25))[LOSS]
    version = log.version
    refresh(log, tmp_path)
    assert log.version == version  # nothing new
    assert log.rewrites == []


@pytest.mark.parametrize("steps", [3, 10, 30])
def test_a_resume_that_cuts_the_log_is_noticed(steps: int, tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(lines(records(20)))
    log = reader(tmp_path)
    refresh(log, tmp_path)
    keep_lines(tmp_path / LOG, lambda line: json.loads(line)["step"] <= 12)
    changed = [{**entry, "tokens_per_second": 7.0} for entry in records(steps, first=13)]
    with open(tmp_path / LOG, "a") as file:
        file.write(lines(changed))
    refresh(log, tmp_path)
    assert log.rewrites == [20]
    expected = naive([*records(12), *changed])
    assert {name: as_dict(curve) for name, curve in log.curves.items()} == expected


DAMAGED = [
    '{"step": 3, "loss": 1.0',
    "null",
    "[1, 2]",
    "1, 2",
    '{"loss": 1.0, "stage": "train"}',
    '{"step": "3", "loss": 1.0, "stage": "train"}',
    '{"step": -1, "loss": 1.0, "stage": "train"}',
    '{"step": 3, "loss": 1.0, "stage": 4}',
    '{"step": 1e3, "loss": 1.0, "stage": "train"}',
    f'{{"step": {10**400}, "stage": "train"}}',
    "[" * 100_000,
    "\x00\x01",
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_counted_and_passed_over(line: str, tmp_path: Path) -> None:
    before, after = lines(records(5)), lines(records(5, first=6))
    (tmp_path / LOG).write_text(f"{before}{line}\n{after}")
    log = reader(tmp_path)
    refresh(log, tmp_path)
    assert log.counts == (12, 1)
    assert as_dict(log.curves[LOSS]) == naive(records(10))[LOSS]


def test_bytes_that_are_no_text_harm_one_line(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"\xff\xfe{\n" + lines(records(3)).encode())
    log = reader(tmp_path)
    refresh(log, tmp_path)
    assert log.counts == (4, 1)
    assert len(log.curves[LOSS].steps) == 3


def test_a_log_that_goes_back_has_the_later_values(tmp_path: Path) -> None:
    again = [{**entry, "loss": 9.0} for entry in records(3, first=4)]
    (tmp_path / LOG).write_text(lines(records(6)) + lines(again))
    for block_bytes in (200, 10**6):
        log = reader(tmp_path, block_bytes)
        refresh(log, tmp_path)
        assert log.turns == [(6, 4)]
        assert log.curves[LOSS].steps.tolist() == [1, 2, 3, 4, 5, 6]
        assert as_dict(log.curves[LOSS]) == {**naive(records(6))[LOSS], 4: 9.0, 5: 9.0, 6: 9.0}


def test_nested_values_become_curves_heat_maps_and_texts() -> None:
    sources = {"wiki": {"loss": 2.0, "targets": 7}, "code": {"loss": 1.0, "targets": 3}}
    entries: list[dict[str, Any]] = [
        {"step": 1, "stage": "train", "loss": "nan", "grad_norms/a.weight": 0.5, "phases": {"data": 0.1, "step": 0.9}},
        {**experts(2, layers=2), "loss": 2.0, "sources": sources, "sample": "once upon", "flag": True, "none": None},
        {"step": 2, "stage": "eval", "task": "arc", "accuracy": 0.5, "items": 10},
        {"step": 2, "stage": "eval", "task": "piqa", "accuracy": "inf", "items": 20},
        {"step": 2, "stage": "eval", "task": "lagging", "loss_back_0": 1.5, "loss_back_16": 2.5},
    ]
    block = parse(lines(entries).encode())
    found = {(name.stage, *name.place): as_dict(curve) for name, curve in block.curves.items()}
    assert np.isnan(found.pop(("train", "loss", ""))[1])
    assert found == {
        ("train", "grad_norms", "a.weight"): {1: 0.5},
        ("train", "phases", "data"): {1: 0.1},
        ("train", "phases", "step"): {1: 0.9},
        ("train", "flag", ""): {2: 1.0},
        **{("train", "expert_load/entropy", f"layer {n}"): {2: 0.9} for n in (0, 1)},
        **{("train", "expert_load/max_violation", f"layer {n}"): {2: 0.6} for n in (0, 1)},
        **{("train", "expert_load/dead", f"layer {n}"): {2: 0.0} for n in (0, 1)},
        **{("train", "sources/loss", name): {2: values["loss"]} for name, values in sources.items()},
        **{("train", "sources/targets", name): {2: values["targets"]} for name, values in sources.items()},
        ("eval", "eval/accuracy", "arc"): {2: 0.5},
        ("eval", "eval/accuracy", "piqa"): {2: np.inf},
        ("eval", "eval/items", "arc"): {2: 10.0},
        ("eval", "eval/items", "piqa"): {2: 20.0},
        ("eval", "eval/loss_back", "0 steps ago"): {2: 1.5},
        ("eval", "eval/loss_back", "16 steps ago"): {2: 2.5},
    }
    assert block.loads == {f"layer {n}": [(2, [0.1, 0.2, 0.3, 0.4])] for n in (0, 1)}
    assert [(text.step, text.name, text.text) for text in block.texts] == [(2, "sample", "once upon")]


def test_whole_numbers_of_any_size_are_read() -> None:
    block = parse(lines([{"step": 1, "stage": "train", "loss": 10**400}]).encode())
    assert block.damaged == 0
    assert block.curves[LOSS].values.tolist() == [np.inf]


def test_a_long_curve_keeps_its_spikes() -> None:
    steps = np.arange(1.0, 100_001)
    values = np.sin(steps / 5000)
    values[[777, 65_432]] = 50.0, -50.0
    values[[5, 6]] = np.nan, np.inf
    few = extremes(Curve(steps, values), 500)
    assert len(few.steps) <= 1002
    assert {778.0, 65_433.0, 1.0, 100_000.0} <= set(few.steps.tolist())
    assert np.all(np.diff(few.steps) > 0)
    assert extremes(Curve(steps[:900], values[:900]), 500).steps.tolist() == steps[:900].tolist()
    middle = means(Curve(steps, np.where(np.arange(100_000) < 50_000, 1.0, np.nan)), 10)
    assert middle.values[:5].tolist() == [1.0] * 5
    assert np.isnan(middle.values[5:]).all()
    odd = means(Curve(steps[:23], steps[:23]), 10)  # rows of three
    assert odd.steps.tolist() == [3, 6, 9, 12, 15, 18, 21, 23]
    assert odd.values.tolist() == [2, 5, 8, 11, 14, 17, 20, 22.5]


def test_a_part_of_a_curve_reaches_the_edges() -> None:
    steps = np.arange(10.0, 20)
    curve = Curve(steps, steps)
    assert between(curve, 12.5, 14).steps.tolist() == [12, 13, 14, 15]
    assert between(curve, 0, 10).steps.tolist() == [10, 11]
    assert between(curve, 30, 40).steps.tolist() == [19]


def test_numbers_for_json() -> None:
    assert as_json(np.array([1.0, np.nan, -np.inf, 0.123456789, 1e300])) == [1, None, None, 0.1234568, 1e300]
