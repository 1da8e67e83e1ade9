"""The loggers csv, tensorboard and wandb: what their own libraries read back is what log.jsonl has, also after a kill."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, finish, read_logs, start
from tests.metrics.test_sinks import Listener, entry, info, reporter_of
from tinytron.errors import ConfigError, StorageError
from tinytron.metrics.sinks import Background, CsvLog, JsonLog, Record, Sink, SinkFailedError, TensorBoard, WandB
from tinytron.metrics.sinks.flat import flat_record
from tinytron.training import Trainer
from tinytron.utils import optional

Pools = Callable[[int], Ranks]
RECORD = {
    **entry(3, "train"),
    "flag": True,
    "sources": {"web": {"loss": 1.5, "tokens_seen": None}},
    "expert_load": [{"layer": 2, "entropy": 0.5, "fractions": [0.5, 0.5]}],
}


def test_records_are_flattened() -> None:
    assert flat_record(RECORD) == {
        **{"train/loss": 2.5, "train/flag": 1, "train/sources/web/loss": 1.5, "train/expert_load/2/entropy": 0.5}
    }
    assert flat_record({"step": 1, "stage": "eval", "task": "sst2", "score": 0.5, "why": "x"}) == {
        "eval/sst2/score": 0.5
    }


# The table.


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def csv_of(folder: Path, step: int = 0) -> CsvLog:
    made = CsvLog()
    made.open(info(folder))
    made.resume(step)
    return made


def test_a_row_per_record_and_a_column_per_number(tmp_path: Path) -> None:
    log = csv_of(tmp_path)
    log.write([entry(1), entry(2)])
    log.write([{**RECORD, "loss": 1 / 3}])
    log.write([entry(3, "val", loss=math.nan)])
    rows = table(tmp_path)
    assert [(row["step"], row["stage"]) for row in rows] == [
        ("1", "train"),
        ("2", "train"),
        ("3", "train"),
        ("3", "val"),
    ]
    assert float(rows[2]["train/loss"]) == 1 / 3
    assert rows[2]["train/sources/web/loss"] == "1.5"
    assert rows[0]["train/sources/web/loss"] == rows[0]["val/loss"] == ""
    assert rows[3]["val/loss"] == "nan"
    header, first = (tmp_path / "log.csv").read_text().splitlines()[:2]
    assert header.startswith("step,stage,train/loss,")
    assert first.startswith("1,train,2.5,")


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_a_resumed_table_goes_on_after_its_step(tmp_path: Path, cut: int) -> None:
    log = csv_of(tmp_path)
    log.write([entry(step, loss=step / 7) for step in (1, 2, 3)])
    file = tmp_path / "log.csv"
    file.write_text(file.read_text()[: len(file.read_text()) - cut])
    log = csv_of(tmp_path, step=2)
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]
    log.write([entry(3, loss=4.0, extra=1.0)])
    rows = table(tmp_path)
    assert [float(row["train/loss"]) for row in rows] == [1 / 7, 2 / 7, 4.0]
    assert [row["train/extra"] for row in rows] == ["", "", "1.0"]


@pytest.mark.parametrize("more", [{}, {"new": 1.0}], ids=["a row", "a column"])
def test_a_full_disk_leaves_the_table_as_it_was(tmp_path: Path, more: dict[str, float]) -> None:
    log = csv_of(tmp_path)
    log.write([entry(1)])
    before = (tmp_path / "log.csv").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(StorageError, match=r"log.csv cannot be written \(File too large\)"):
            log.write([entry(2, **more)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "log.csv").read_text() == before
    log.write([entry(2, **more), entry(3)])
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3"]


# The thread.


class Slow(Sink):
    """Waits for ``gate`` before every call, and raises at ``bad``."""

    def __init__(self, bad: int = -1) -> None:
        self.gate, self.bad = threading.Semaphore(0), bad
        self.steps: list[Any] = []

    def write(self, records: Sequence[Record]) -> None:
        self.gate.acquire()
        if self.bad in [record["step"] for record in records]:
            raise RuntimeError("the network is down\nand more")
        self.steps += [record["step"] for record in records]

    def close(self) -> None:
        self.steps.append("closed")


def test_writing_does_not_wait_and_closing_does() -> None:
    slow = Slow()
    sink = Background(slow, "slow")
    for step in range(5):
        sink.write([entry(step)])
    assert slow.steps == []
    slow.gate.release(5)
    sink.close()
    assert slow.steps == [0, 1, 2, 3, 4, "closed"]
    slow.gate.release()
    sink.write([entry(5)])  # of an evaluation after training
    sink.close()
    assert slow.steps[-2:] == [5, "closed"]


def test_a_sink_that_hangs_is_left_behind() -> None:
    sink = Background(Slow(), "slow", most=2, close_seconds=0.1)
    for step in range(2):
        sink.write([entry(step)])
    while sink._calls.qsize() > 1:  # the thread has the first
        time.sleep(0.01)
    sink.write([entry(2)])
    with pytest.raises(SinkFailedError, match="the logger slow stops: it is 2 reports behind"):
        sink.write([entry(3)])
    sink = Background(Slow(), "slow", close_seconds=0.1)
    sink.write([entry(1)])
    sink.write([entry(2)])
    began = time.monotonic()
    with pytest.raises(SinkFailedError, match=r"the logger slow stops: \d reports are not sent after 0.1 s"):
        sink.close()
    assert time.monotonic() - began < 5


def _fails(folder: Path) -> tuple[list[str], list[Any]]:
    said: list[str] = []
    listener, slow = Listener(said), Slow(bad=2)
    reporter = reporter_of(Background(slow, "slow"), listener)
    reporter.start(info(folder))
    slow.gate.release(9)
    for step in (1, 2):
        reporter.write([entry(step)])
    while not any("slow" in line for line in said):
        reporter.write([entry(3)])
        time.sleep(0.01)
    before = len(listener.calls)
    reporter.write([entry(4)])
    return [*said, str(len(listener.calls) - before)], slow.steps


def test_a_failing_sink_costs_the_sink_and_says_so_once(ranks: Pools, tmp_path: Path) -> None:
    ((said, steps),) = ranks(1).run(_fails, tmp_path)
    line = "error: the logger slow stops: the network is down; training continues without it"
    assert (said, steps) == ([line, "1"], [1])


# Read back by their own libraries.


def tensorboard_scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar that TensorBoard shows, by name and step. Its page reads with this class."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    names = events.Tags()["tensors"]
    found = [(n, event.step, float(make_ndarray(event.tensor_proto))) for n in names for event in events.Tensors(n)]
    assert len({(name, step) for name, step, _ in found}) == len(found), "a step is there twice"
    return {(name, step): value for name, step, value in found}


def wandb_messages(file: Path) -> Iterator[bytes]:
    """The messages in a W&B file: LevelDB's log format (blocks of 32 KiB with pieces of messages) after 7 bytes."""
    content, at, pieces = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or not kind:
            at += left
            continue
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last piece
            yield pieces
            pieces = b""


def wandb_scalars(folder: Path) -> tuple[list[dict[tuple[str, int], float]], list[Any]]:
    """Every number in the files of each W&B session, by name and step; and the descriptions of the run."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record as WandBRecord

    sessions, runs = [], []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        session: dict[tuple[str, int], float] = {}
        for message in wandb_messages(file):
            record = WandBRecord.FromString(message)
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                row = {name: float(json.loads(value)) for name, value in items.items() if name[0] != "_"}
                step = int(row.pop("step"))
                session |= {(name, step): value for name, value in row.items()}
        sessions.append(session)
    return sessions, runs


def expected_scalars(folder: Path) -> dict[tuple[str, int], float]:
    records = read_logs(folder)[1]
    return {(name, record["step"]): value for record in records for name, value in flat_record(record).items()}


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        sink = TensorBoard()
        sink.open(dataclasses.replace(info(tmp_path), first_step=first))
        sink.write([entry(step, loss=first + step / 3) for step in steps])
        sink.close()
    assert tensorboard_scalars(tmp_path) == {("train/loss", 1): 1 / 3} | {
        ("train/loss", step): 1 + step / 3 for step in (2, 3, 4)
    }


def test_tensorboard_forgets_the_steps_before_a_return(tmp_path: Path) -> None:
    sink = TensorBoard()
    pytest.importorskip("tensorboard")
    sink.open(info(tmp_path))
    sink.write([entry(step, loss=1.0) for step in (1, 2, 3)])
    sink.go_back(1)
    sink.write([entry(2, loss=2.0)])
    sink.close()
    assert tensorboard_scalars(tmp_path) == {("train/loss", 1): 1.0, ("train/loss", 2): 2.0}


def _with_a_return(folder: Path) -> Path:
    from tests.training.test_rollback import BACK, BadData

    flags = ("--loggers", "jsonl", "csv", "messages", "tensorboard", "wandb", "--wandb_mode", "offline")
    trainer = BadData(config_of(*TINY, *BACK, *flags, "--log_dir", folder))
    trainer.train()
    return trainer.log_dir


def test_all_loggers_agree_after_a_return(ranks: Pools, tmp_path: Path) -> None:
    """W&B takes nothing back, so there the steps have two values, and the later one counts."""
    (folder,) = ranks(1).run(_with_a_return, tmp_path)
    steps = [record["step"] for record in read_logs_of(folder) if record["stage"] == "train"]
    assert steps == list(range(1, 15))
    numbers = {
        (name, record["step"]): value for record in read_logs_of(folder) for name, value in flat_record(record).items()
    }
    assert tensorboard_scalars(folder) == numbers
    (session,), _ = wandb_scalars(folder)
    assert {key: session[key] for key in numbers} == numbers
    assert session.keys() - numbers.keys() <= {(name, step) for name, _ in session for step in (9, 10)}
    with open(folder / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "train"]
    assert [(int(row["step"]), float(row["train/loss"])) for row in rows] == [
        (step, numbers["train/loss", step]) for step in steps
    ]


WANDB_OPTIONS = ("wandb_project", "wandb_run_name", "wandb_group", "wandb_mode")
KILLED = """
import os, signal, sys, time
from tinytron.checkpoint.files import complete_checkpoints
from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args

class Killed(Trainer):
    def train_step(self, microbatches):
        if self.step == 3 and not self._continues:
            while not complete_checkpoints(self.log_dir):  # it is written in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        super().train_step(microbatches)

entry.run(lambda: Killed(build_config(parse_args(sys.argv[1:]))).train())
"""


def test_all_loggers_agree_across_a_kill(tmp_path: Path) -> None:
    for package in ("tensorboard", "wandb"):
        pytest.importorskip(package)
    (tmp_path / "killed.py").write_text(KILLED)
    flags = (
        *(*TINY, "--max_steps", 4, "--save_every_steps", 2, "--log_every", 1, "--do_val", "--val_every_steps", 2),
        *("--log_dir", tmp_path / "log", "--loggers", "console", "log", "jsonl", "csv", "tensorboard", "wandb"),
        *("--wandb_mode", "offline", "--wandb_project", "tests", "--wandb_run_name", "killed", "--wandb_group", "all"),
    )
    codes = []
    for _ in range(2):
        done = finish(start(*flags, cwd=tmp_path, script=tmp_path / "killed.py"))
        codes.append(done.code)
    assert codes == [-9, 0], done.stderr
    assert done.stderr == ""
    (folder,) = (tmp_path / "log").iterdir()
    expected = expected_scalars(folder)
    assert ("train/loss", 4) in expected
    assert ("val/loss", 4) in expected
    assert tensorboard_scalars(folder) == expected
    rows = table(folder)
    found = {
        (name, int(row["step"])): float(value)
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "stage")
    }
    assert found == expected
    (before, after), runs = wandb_scalars(folder)
    assert len({run.run_id for run in runs}) == 1
    about = runs[0]
    assert (about.project, about.display_name, about.run_group) == ("tests", "killed", "all")
    sections = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert sections["train"]["seq_len"] == 12
    assert "git" in sections["run"]
    repeated = [key for key in before.keys() & after.keys() if "loss" in key[0]]
    assert all(before[key] == after[key] for key in repeated)
    assert after, "the second session logs, too"
    both = before | after
    assert both.keys() == expected.keys()
    # Steps that were repeated have the speed of the first time.
    of_both = ("train/tokens_per_second", "train/mfu", "train/phases/", "train/peak_memory_gib")
    exact = [key for key in expected if not key[0].startswith(of_both)]
    assert {key: both[key] for key in exact} == {key: expected[key] for key in exact}


def _opens(folder: Path, first: int) -> tuple[str, list[str]]:
    """What is raised and said if a logger fails to open. A job."""

    class Away(Listener):
        def open(self, run: Any) -> None:
            raise SinkFailedError("the logger x stops") if run.first_step else OSError(17, "File exists")

    said: list[str] = []
    reporter = reporter_of(Away([]), Listener(said))
    try:
        reporter.start(dataclasses.replace(info(folder), first_step=first))
    except ConfigError as error:
        return str(error), said
    reporter.write([entry(first + 1)])
    return "", said


def test_a_logger_that_is_away_when_a_run_resumes_is_left_out(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(1).run(_opens, tmp_path, 0)[0] == ("the logger Away cannot begin ([Errno 17] File exists)", [])
    assert ranks(1).run(_opens, tmp_path, 3)[0] == (
        "",
        ["error: the logger x stops; training continues without it"],
    )


def _evaluated_after_training(log_dir: Path) -> Path:
    flags = ("--loggers", "jsonl", "wandb", "tensorboard", "--wandb_mode", "offline", "--do_val", "--max_steps", 2)
    trainer = Trainer(config_of(*TINY, *flags, "--log_dir", log_dir))
    trainer.train()
    trainer.eval()
    trainer.eval()
    return trainer.log_dir


def test_an_evaluation_after_training_is_logged(ranks: Pools, tmp_path: Path) -> None:
    """Twice: of the same step, W&B keeps the first."""
    pytest.importorskip("wandb")
    (folder,) = ranks(1).run(_evaluated_after_training, tmp_path)
    assert [record["stage"] for record in read_logs_of(folder)] == ["train", "train", "val", "val", "val"]
    sessions, _ = wandb_scalars(folder)
    assert ("val/loss", 2) in sessions[0]


def read_logs_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Recorder:
    """Stands for a run of W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, float]] = []

    def log(self, values: dict[str, float]) -> None:
        self.logged.append((int(values["step"]), values["train/loss"]))

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def test_wandb_repeats_only_what_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    ids, time_of = [], [0.0]
    about = dataclasses.replace(info(tmp_path), config={"logging": dict.fromkeys(WANDB_OPTIONS)})

    def session(first: int, steps: Sequence[int], ends: bool) -> list[tuple[int, float]]:
        run = Recorder()
        monkeypatch.setattr(wandb, "init", lambda **options: ids.append(options["id"]) or run)
        sink, log = WandB(now=lambda: time_of[0]), JsonLog()
        for one in (log, sink):
            one.open(dataclasses.replace(about, first_step=first))
            one.resume(first)
        for step in steps:
            time_of[0] += 9.0
            for one in (log, sink):
                one.write([entry(step, loss=float(len(ids)))])
        if ends:
            sink.close()
        return run.logged

    assert session(0, (1, 2, 3, 4, 5), ends=False) == [(step, 1.0) for step in (1, 2, 3, 4, 5)]
    # Steps 1 and 2 were certain, step 3 is in log.jsonl, and 4 is trained again.
    assert session(3, (4, 5), ends=True) == [(3, 1.0), (4, 2.0), (5, 2.0)]
    assert session(4, (5, 6), ends=True) == [(6, 3.0)]
    assert len(set(ids)) == 1
    assert session(0, (1, 2), ends=True) == [(1, 4.0), (2, 4.0)]  # a run that begins anew, as with --debug
    assert len(set(ids)) == 2


def test_unknown_loggers_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"--loggers tensorbord is not one of log, jsonl, .*; did you mean tensorboard"
    ):
        config_of("--loggers", "console", "tensorbord")
    with pytest.raises(
        ConfigError,
        match="--wandb_project p needs the logger wandb; use --loggers console log jsonl messages wandb, or drop it",
    ):
        config_of("--wandb_project", "p")

    wandb = pytest.importorskip("wandb")

    def refuse(**options: Any) -> Any:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    about = dataclasses.replace(info(tmp_path), config={"logging": dict.fromkeys(WANDB_OPTIONS)})
    with pytest.raises(
        SinkFailedError, match=r"the logger wandb stops: Weights & Biases cannot be reached, or refuses"
    ):
        WandB().open(dataclasses.replace(about, first_step=3))
    said = r"refuses the run \(api_key not configured\); run wandb login, or use --wandb_mode offline"
    with pytest.raises(ConfigError, match=said):
        WandB().open(about)

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'package tensorboard is needed .* pip install "tinytron\[tensorboard\]"'):
        TensorBoard().open(info(tmp_path))
