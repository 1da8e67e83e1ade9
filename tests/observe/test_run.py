"""A run as it is shown: everything that it logs, its state, and what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.run_folders import experts, lines, make_run, records
from tests.helpers.runs import ROOT, train
from tinytron.errors import DataError
from tinytron.metrics.expert_load import load_statistics
from tinytron.observe.curves import Curve
from tinytron.observe.events import spikes
from tinytron.observe.folder import names_of, open_folder, runs_inside
from tinytron.observe.run import Run
from tinytron.observe.table import clean, sparkline, summary_table
from tinytron.training import Trainer
from tinytron.utils.remote import RemoteFolder

Pools = Callable[[int], Ranks]


def read(path: Path | str) -> Run:
    run = Run(open_folder(str(path)), "run")
    assert run.refresh()
    assert run.problem == ""
    return run


def strict(payload: Any) -> Any:
    """``payload`` as a browser gets it. Raises: ValueError for what JSON lacks."""
    return json.loads(json.dumps(payload, allow_nan=False))


def texts(run: Run, kind: str) -> list[tuple[int, str]]:
    return [(event.step, event.text) for event in run.events() if event.kind == kind]


def numbers(value: Any) -> int:
    """How many numbers ``value`` holds that belong into curves."""
    if isinstance(value, dict):
        return sum(numbers(inner) for key, inner in value.items() if key not in ("fractions", "layer"))
    return sum(map(numbers, value)) if isinstance(value, list) else int(isinstance(value, int | float))


def test_everything_that_a_real_run_logs_is_shown(ranks: Pools, tmp_path: Path) -> None:
    moe = (
        "--use_moe",
        "--num_experts",
        4,
        "--num_experts_per_tok",
        2,
        "--moe_intermediate_size",
        8,
        "--moe_router_debug",
    )
    often = ("--log_every", 1, "--do_val", "--val_every_steps", 2, "--save_every_steps", 2, "--max_steps", 4)
    ranks(1).run(train, Trainer, tmp_path, *moe, *often, "--split_rate", 0.25, "--max_steps", 2)
    (made,) = ranks(1).run(train, Trainer, tmp_path, *moe, *often, "--split_rate", 0.25)
    run = read(made.folder)
    shown = strict(run.payload())
    expected = sum(numbers({k: v for k, v in record.items() if k not in ("step", "stage")}) for record in made.records)
    assert sum(len(curve["x"]) for curve in shown["curves"]) == expected
    losses = {c["stage"]: dict(zip(c["x"], c["y"], strict=True)) for c in shown["curves"] if c["chart"] == "loss"}
    for stage in ("train", "val"):
        logged = {record["step"]: record["loss"] for record in made.records if record["stage"] == stage}
        assert losses[stage] == pytest.approx(logged, rel=1e-6)
    assert [load["layer"] for load in shown["loads"]] == ["layer 0", "layer 1"]
    for load in shown["loads"]:
        assert load["steps"] == [1, 2, 3, 4]
        assert np.mean(load["shares"], axis=1) == pytest.approx(np.ones(4), abs=1e-2)
    assert [(c["step"], c["size"] > 1000, c["written"] > 1e9) for c in shown["checkpoints"]] == [
        (2, True, True),
        (4, True, True),
    ]
    summary = shown["summary"]
    assert (summary["state"], summary["step"], summary["tokens"], summary["samples"]) == ("finished", 4, 384, 32)
    assert summary["loss"] == made.records[-2]["loss"]
    assert shown["config"]["train.max_steps"] == "4"
    assert "git" in shown["facts"]
    assert [(event["step"], event["kind"]) for event in shown["events"]] == [(2, "resumed"), (4, "finished")]


def test_looking_at_runs_imports_no_torch() -> None:
    """So that the commands start at once."""
    code = "import sys, tinytron.cli.watch, tinytron.cli.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_run_behind_a_url_is_the_same(storage: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "here", records(30), max_steps=30)
    (folder / "00010_opt").mkdir()
    for name in ("00010_meta.pt", "00010_model.pt", "00010_opt/__0_0.distcp"):
        (folder / name).write_bytes(bytes(100))
    there = RemoteFolder(f"{storage}/runs/one")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    there.push(folder, names)
    run, local = read(there.url), read(folder)
    same = ("curves", "config", "facts", "loads")
    assert {key: run.payload()[key] for key in same} == {key: local.payload()[key] for key in same}
    assert [(c.step, c.size) for c in run.checkpoints] == [(c.step, c.size) for c in local.checkpoints] == [(10, 300)]
    with open(folder / "log.jsonl", "a") as file:
        file.write(lines(records(5, first=31)))
    there.push(folder, ["log.jsonl"])
    run.refresh()
    assert run.log.last_step == 35
    with pytest.raises(DataError, match=r"runs is not a run folder: .* use .*/runs/one$"):
        open_folder(f"{storage}/runs")
    assert runs_inside(f"{storage}/runs") == [f"{storage}/runs/one"]
    assert runs_inside(there.url) == []


@pytest.mark.parametrize(
    ("steps", "max_steps", "age", "state"),
    [(30, 30, 9999, "finished"), (20, 30, 1, "running"), (20, 30, 9999, "stopped"), (20, 0, 9999, "ended")],
)
def test_states(steps: int, max_steps: int, age: float, state: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path, records(steps), max_steps)
    os.utime(folder / "log.jsonl", (time.time() - age,) * 2)
    run = read(folder)
    assert run.state == state
    assert bool(texts(run, "stopped")) == (state == "stopped")
    left = run.summary()["seconds_left"]
    assert left == (pytest.approx(10 * 96 / 1020) if state == "running" else None)


def test_a_slow_run_is_not_taken_for_a_stopped_one(tmp_path: Path) -> None:
    slow = [{**record, "tokens_per_second": 0.5} for record in records(5) if record["stage"] == "train"]
    folder = make_run(tmp_path, slow)
    os.utime(folder / "log.jsonl", (time.time() - 700,) * 2)  # 192 seconds a step
    assert read(folder).state == "running"


def test_a_run_that_has_not_logged_yet(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [])
    (folder / "log.jsonl").unlink()
    run = read(folder)
    assert run.state == "not begun"
    assert strict(run.payload())["curves"] == []


def test_what_happened(tmp_path: Path) -> None:
    entries = [entry for entry in records(200) if entry["stage"] == "train"]
    entries[119]["loss"] = 30.0
    entries[149]["grad_norm"] = "nan"
    for n, entry in enumerate(entries):
        entry["skipped_steps"] = 2 * (n >= 149) + (n >= 179)
    folder = make_run(tmp_path, entries, max_steps=200)
    (folder / "log.jsonl.1").write_text("old")
    stall = "rank 3: no step completed for 61.0 s, after step 77; waits in all_reduce, called at tinytron/x.py:1 (f)"
    (folder / "stacks_rank3.txt").write_text(f"{stall}\nThread 0x1:\n  File ...\n")
    (folder / "00050_meta.pt").write_bytes(b"x")
    os.utime(folder / "00050_meta.pt", (1e9, 1e9))
    run = read(folder)
    mean = np.mean([entry["loss"] for entry in entries[69:119]])
    assert texts(run, "spike") == [(120, f"the loss rose to 30; the mean of the 50 values before is {mean:.4g}")]
    assert texts(run, "not finite") == [(150, "the grad norm was nan")]
    assert texts(run, "skipped") == [(150, "2 steps skipped (2 in all)"), (180, "1 step skipped (3 in all)")]
    assert texts(run, "stalled") == [(77, stall)]
    resumed = [
        (0, "an earlier log of this folder was set aside as log.jsonl.1"),
        (50, "the last start continued after step 50"),
    ]
    assert texts(run, "resumed") == resumed
    assert texts(run, "finished") == [(200, "the run reached --max_steps 200")]
    assert [event.step for event in run.events()] == [0, 50, 77, 120, 150, 150, 180, 200]


def test_what_the_run_said_of_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path, records(50))
    said = [
        (0.0, 0, "resuming after step 20 from log/x/00020_model.pt"),
        (60.0, 30, "error: s3://b/run: cannot write log.txt (it is away); training continues"),
        (61.0, 31, "step 30 | saved log/x/00030_model.pt in 0.1 s"),
        (120.0, 41, "step 41 | stopped by SIGTERM: saved; run the same command again to resume"),
    ]
    lines = [json.dumps({"time": when, "step": step, "text": text}) for when, step, text in said]
    damaged = ["{half", "[]", '{"time": "x", "step": 1, "text": ""}', '{"time": 1e99, "step": 1, "text": ""}', "null"]
    (folder / "messages.jsonl").write_text("\n".join([*damaged, *lines]) + "\n")
    (folder / "00010_meta.pt").write_bytes(b"x")
    os.utime(folder / "00010_meta.pt", (1e9, 1e9))  # says less than the messages
    run = read(folder)
    assert strict(run.payload())["messages"] == [{"time": w, "step": s, "text": t} for w, s, t in said]
    assert texts(run, "resumed") == [(20, "the run continued after step 20, 1970-01-01 00:00 UTC")]
    assert texts(run, "error") == [(30, f"{said[1][2].removeprefix('error: ')} (1970-01-01 00:01 UTC)")]
    text = "stopped by SIGTERM: saved; run the same command again to resume (1970-01-01 00:02 UTC)"
    assert texts(run, "stopped") == [(41, text)]
    assert run.state == "stopped"  # at once, although the log is new
    with open(folder / "messages.jsonl", "a") as file:
        file.write(json.dumps({"time": 130.0, "step": 41, "text": "run folder: log/x"}) + "\n")
    run.refresh()
    assert run.state == "running"


def test_a_smooth_or_noisy_loss_has_no_spikes() -> None:
    steps = np.arange(1.0, 5001)
    noise = np.random.default_rng(0).normal(size=5000)
    for values in (8 / np.sqrt(steps), 3 + 0.1 * noise, np.full(5000, 2.0), 1e6 + np.zeros(5000)):
        assert spikes(Curve(steps, values)) == []
    tiny = np.where(steps == 3000, 3.01, 3 + 1e-5 * noise)  # hundreds of standard deviations, but no rise to speak of
    assert spikes(Curve(steps, tiny)) == []
    rising = np.where(steps > 4000, 4 + 0.1 * noise, 3 + 0.1 * noise)
    (event,) = spikes(Curve(steps, rising))
    assert event.step in range(4000, 4010)


def test_events_are_listed_up_to_a_limit() -> None:
    steps = np.arange(1.0, 10_001)
    values = np.where(steps % 100 == 0, 20 + steps / 1000, 3 + 0.01 * np.sin(steps))
    found = spikes(Curve(steps, values))
    assert len(found) == 25
    assert [event.step for event in found] == sorted(event.step for event in found)


def test_names_tell_runs_apart() -> None:
    assert names_of(["/a/log/one", "/a/log/two"]) == ["one", "two"]
    assert names_of(["/a/log/one", "/b/log/one", "/b/log/two"]) == ["a/log/one", "b/log/one", "two"]
    assert names_of(["s3://b/one", "/b/one"]) == ["s3://b/one", "/b/one"]


def test_an_unreadable_folder_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read(make_run(tmp_path, records(5)))
    version = run.version

    def refuse() -> Any:
        raise PermissionError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(run.folder, "files", refuse)
        run.refresh()
    assert run.summary()["problem"] == "the disk is away"
    assert run.version != version
    assert run.log.last_step == 5  # the curves stay
    assert summary_table([run])[-1] == "run: the disk is away"
    run.refresh()
    assert run.problem == ""


def test_many_curves_have_fewer_points_each(tmp_path: Path) -> None:
    entries = [{"step": n, "stage": "train", **{f"norms/{k}": n * k for k in range(1000)}} for n in range(1, 301)]
    shown = strict(read(make_run(tmp_path, entries)).payload())
    assert len(shown["curves"]) == 1000
    assert max(len(curve["x"]) for curve in shown["curves"]) <= 202
    assert all(curve["x"][-1] == 300 for curve in shown["curves"])


def test_the_heat_map_has_evenly_spaced_steps_and_the_newest(tmp_path: Path) -> None:
    entries = [{**experts(step), "loss": 1.0} for step in range(1, 1001)]
    entries[-1]["expert_load"] = load_statistics([[8, 0, 0, 0]] * 3)
    (first, *_) = strict(read(make_run(tmp_path, entries)).payload())["loads"]
    assert len(first["steps"]) <= 240
    assert first["steps"][-1] == 1000
    assert set(np.diff(first["steps"])) == {5}
    assert first["shares"][0] == [0.4, 0.8, 1.2, 1.6]
    assert first["shares"][-1] == [4, 0, 0, 0]


def test_the_table_for_terminals(tmp_path: Path) -> None:
    run = read(make_run(tmp_path, records(40), max_steps=40))
    run.name = "a\x1b[31mname"
    head, row, empty, event = summary_table([run])
    assert head.split() == [
        "run",
        "state",
        "step",
        "of",
        "loss",
        "loss",
        "over",
        "steps",
        "val",
        "loss",
        "lr",
        "grad",
        "norm",
        "tok/s",
        "MFU",
        "left",
    ]
    assert row.split() == [
        *("a?[31mname", "finished", "40", "40", f"{3.05 + 0.1 * np.sin(40):.4f}", row.split()[5]),
        *(f"{3.15 + 0.1 * np.sin(40):.4f}", "2.50e-04", "1.500", "1,040", "25.0%", "-"),
    ]
    assert (empty, event) == ("", "a?[31mname: step 40: the run reached --max_steps 40")
    assert row.split()[5][0] == "█"
    assert len(row.split()[5]) <= 16
    assert sparkline(Curve(np.arange(3.0), np.array([1.0, np.nan, 2.0]))) == "▁█"
    assert clean("a\nb\x9b") == "a?b?"
