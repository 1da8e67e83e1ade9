"""Phases of a step: every moment counts once, nested phases do not count for the outer one, a slow rank is named."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, read_logs, train
from tinytron.data import Batch
from tinytron.distributed.zero1.flat_buffer import FlatBuffer
from tinytron.distributed.zero1.timing import seconds_of_reductions
from tinytron.metrics.phases import phase_record
from tinytron.model.modules.loss import LossSums
from tinytron.training import Trainer
from tinytron.utils import phases
from tinytron.utils.phases import (
    BACKWARD,
    DATA,
    EVALUATION,
    EXCHANGE,
    FORWARD,
    OTHER,
    PHASES,
    SAVE,
    PhaseTimer,
    during,
    phase,
)

Pools = Callable[[int], Ranks]
CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which tests set."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    yield now
    PhaseTimer.active = None


def taken(timer: PhaseTimer) -> dict[str, float]:
    return {name: seconds for name, seconds in timer.take().items() if seconds}


def test_every_moment_counts_for_the_innermost_phase(clock: list[float]) -> None:
    timer = PhaseTimer(CPU)
    with phase(FORWARD):  # nothing is active yet
        clock[0] += 1
    timer.start()
    clock[0] += 2
    with phase(FORWARD):
        clock[0] += 4
        with phase(EXCHANGE):
            clock[0] += 8
        clock[0] += 16
    assert taken(timer) == {OTHER: 2, FORWARD: 20, EXCHANGE: 8}
    clock[0] += 32
    assert taken(timer) == {OTHER: 32}
    timer.stop()
    with phase(FORWARD):
        clock[0] += 64
    timer.start()  # training goes on
    assert taken(timer) == {}


def test_a_training_inside_another_gives_the_time_back(clock: list[float]) -> None:
    outer, inner = PhaseTimer(CPU), PhaseTimer(CPU)
    outer.start()
    with phase(EVALUATION):
        clock[0] += 1
        inner.start()
        with phase(FORWARD):
            clock[0] += 2
        assert taken(inner) == {FORWARD: 2}
        inner.stop()
    with phase(BACKWARD):
        clock[0] += 4
    assert taken(outer) == {EVALUATION: 3, BACKWARD: 4}
    with phase(FORWARD):
        clock[0] += 8
    outer.stop()
    outer.start()  # after an error, training begins again
    assert taken(outer) == {}


def test_a_timer_that_starts_inside_a_phase_does_not_count_its_end(clock: list[float]) -> None:
    timer = PhaseTimer(CPU)
    with phase(SAVE):
        timer.start()
        clock[0] += 1
    clock[0] += 1
    assert taken(timer) == {OTHER: 2}


def test_an_error_ends_its_phase(clock: list[float]) -> None:
    timer = PhaseTimer(CPU)
    timer.start()
    with contextlib.suppress(ZeroDivisionError), phase(FORWARD):
        clock[0] += 1
        raise ZeroDivisionError
    clock[0] += 2
    assert taken(timer) == {FORWARD: 1, OTHER: 2}


def test_waiting_for_items_counts_and_the_source_is_closed(clock: list[float]) -> None:
    closed = []

    def source() -> Iterator[int]:
        try:
            for number in range(9):
                clock[0] += 1
                yield number
        finally:
            closed.append(True)

    timer = PhaseTimer(CPU)
    timer.start()
    items = during(DATA, source())
    for number in items:
        clock[0] += 10
        if number == 1:
            break
    items.close()  # type: ignore[attr-defined]
    assert taken(timer) == {DATA: 2, OTHER: 20}
    assert closed == [True]
    assert list(during(DATA, iter([1, 2]))) == [1, 2]


class Slow(Trainer):
    """Rank 1 is slow in every forward pass."""

    def _loss(self, batch: Batch) -> LossSums:
        if self.state.rank == 1 and self.model.training:
            time.sleep(0.15)
        return super()._loss(batch)


FLAGS = ("--max_steps", 3, "--log_every", 1, "--do_val", "--val_every_steps", 1, "--save_every_steps", 1)


def run(log_dir: Path, *flags: object) -> Run:
    return train(Slow, log_dir, *FLAGS, *flags)


def test_the_log_names_the_slowest_rank(ranks: Pools, tmp_path: Path) -> None:
    result = ranks(2).run(run, tmp_path)[0]
    records: list[dict[str, Any]] = [record for record in result.records if record["stage"] == "train"]
    assert len(records) == 3
    for record in records[1:]:
        found = record["phases"]
        assert list(found) == list(PHASES)
        assert record["slowest_rank"] == 1
        assert 0.1 < record["peak_memory_gib"] < 8  # of torch and a tiny model
        assert record["slowest_excess"] > 0.1
        assert found[FORWARD] > 0.05  # two micro-batches on one of two ranks
        assert found[EXCHANGE] > 0.02  # the other one waits
        assert min(found[BACKWARD], found[EVALUATION], found[SAVE]) > 0
        step = 96 / record["tokens_per_second"]
        aside = found[EVALUATION] + found[SAVE]
        assert sum(found.values()) - aside == pytest.approx(step, rel=0.3)  # the sinks' work is in neither


def _own_loop(log_dir: Path) -> list[dict[str, Any]]:
    trainer = Trainer(config_of(*TINY, "--log_every", 1, "--max_steps", 2, "--log_dir", log_dir))
    for microbatches in trainer.data.steps(0):
        trainer.train_step(microbatches)
        trainer.step += 1
        trainer._maybe_log()
    return read_logs(trainer.log_dir)[1]


def test_a_loop_of_ones_own_has_none(ranks: Pools, tmp_path: Path) -> None:
    (records,) = ranks(1).run(_own_loop, tmp_path)
    assert [record["step"] for record in records] == [1, 2]
    assert all("phases" not in record for record in records)


def test_without(ranks: Pools, tmp_path: Path) -> None:
    (result,) = ranks(1).run(run, tmp_path, "--no-log_phases")
    assert all("phases" not in record for record in result.records)
    (alone,) = ranks(1).run(run, tmp_path / "alone")
    assert "phases" in alone.records[0]
    assert "slowest_rank" not in alone.records[0]


def _record(state_of: Path) -> dict[str, Any]:
    trainer = Trainer(config_of(*TINY, "--log_dir", state_of))
    waits = [0.1, 0.4][trainer.state.rank]
    seconds = dict.fromkeys(PHASES, 0.0) | {EXCHANGE: 2 * waits, FORWARD: 2 * (1 - waits)}
    found = phase_record(seconds, 2, trainer.state, 0.5)
    assert phase_record(seconds, 2, trainer.state, 0.05)["hidden_exchange"] == 0
    return found


def test_what_is_hidden_is_what_the_fastest_to_leave_did_not_wait_for(ranks: Pools, tmp_path: Path) -> None:
    for record in ranks(2).run(_record, tmp_path):
        assert record["hidden_exchange"] == pytest.approx(0.5 - 0.1)
        assert (record["slowest_rank"], record["phases"][EXCHANGE]) == (0, pytest.approx(0.25))


class _Late:
    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        time.sleep(0.05)
        self.work.wait()


def _reductions(log_dir: Path) -> tuple[float, int, bool]:
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir))
    optimizer, world = trainer.optimizer, trainer.state.groups["world"]
    buckets = sum(len(buffer.bucket_ids) for buffer in optimizer.buffers)
    reduce = FlatBuffer.reduce_bucket
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatBuffer, "reduce_bucket", lambda buffer, bucket: _Late(reduce(buffer, bucket)))
        found = seconds_of_reductions(optimizer, world, trainer.device)
    clean = all(param.grad is None for param in trainer.raw_model.parameters())
    return found, buckets, clean and not any(bool(buffer.grad_data.any()) for buffer in optimizer.buffers)


def test_the_exchange_by_itself(ranks: Pools, tmp_path: Path) -> None:
    for seconds, buckets, clean in ranks(2).run(_reductions, tmp_path):
        assert 0.05 * buckets <= seconds < 0.05 * buckets + 1
        assert clean


def test_timing_changes_no_number(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 3, "--dropout", 0.1)
    logs = [ranks(2).run(train, Trainer, tmp_path / name, *flags, f"--{name}log_phases")[0].log for name in ("", "no-")]
    assert logs[0] == logs[1]
