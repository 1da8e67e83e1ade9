"""The guard rails in the training loop, on the live ranks: who stops whom, what is skipped, what a checkpoint keeps."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses, read_logs, train, untimed, user_error
from tests.helpers.stopping import StoppingTrainer, run_until, whole
from tinytron.data import Batch
from tinytron.model.modules.loss import LossSums
from tinytron.training import Trainer
from tinytron.training.run import guards

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


class Signalled(Trainer):
    """The last rank is asked to stop while it computes step ``during``."""

    during = 4

    def train_step(self, microbatches: list[Batch]) -> None:
        if self.step + 1 == self.during and self.state.rank == self.state.layout.world_size - 1:
            signal.raise_signal(signal.SIGUSR1)
            while not self.guards._request.received:
                time.sleep(0.001)
        super().train_step(microbatches)


def _stopped(
    during: int, log_dir: Path, *flags: object, cls: type[Trainer] = Signalled
) -> tuple[int, Any, list[str], str]:
    """Step and exit status of a run, its files, and the last line said."""
    said: list[str] = []
    trainer = type("T", (cls,), {"during": during, "_say": lambda _, *texts: said.extend(texts)})(
        config_of(*TINY, "--log_dir", log_dir, *flags)
    )
    status = None
    try:
        trainer.train()
    except SystemExit as end:
        status = end.code
    assert trainer.guards._agreement._work is None  # nothing is left on its way
    trainer.state.groups["world"].barrier().wait()
    return trainer.step, status, sorted(p.name for p in trainer.log_dir.glob("*.pt")), said[-1]


@WORLDS
def test_all_ranks_stop_after_the_next_step_and_save(ranks: Pools, tmp_path: Path, world: int) -> None:
    flags = ("--max_steps", 9, "--do_val", "--val_every_steps", 1)
    saved = ["00005_meta.pt", "00005_model.pt"]
    said = "step 5 | stopped by SIGUSR1: saved; run the same command again to resume"
    assert ranks(world).run(_stopped, 4, tmp_path, *flags) == [(5, 0, saved, said)] * world
    log = train_log(tmp_path)
    assert (list(losses(log)), list(losses(log, "val"))) == ([1, 2, 3, 4, 5], [1, 2, 3, 4])
    unbroken = ranks(world).run(train, Trainer, tmp_path / "unbroken", *flags)[0]
    resumed = ranks(world).run(train, Trainer, tmp_path, *flags)[0]
    assert losses(resumed.log) == losses(unbroken.log)


def train_log(log_dir: Path) -> str:
    return read_logs(next(log_dir.glob("tiny_*")))[0]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--no-do_save",), "nothing is saved with --no-do_save"),
        (("--debug",), "nothing is saved with --debug"),
        (("--no-resume",), "saved; run this command without --no-resume again to resume"),
    ],
)
def test_it_says_what_is_saved(ranks: Pools, tmp_path: Path, flags: tuple[object, ...], what: str) -> None:
    for step, status, files, said in ranks(2).run(_stopped, 3, tmp_path, "--max_steps", 9, *flags):
        assert (step, status, said) == (4, 0, f"step 4 | stopped by SIGUSR1: {what}")
        assert bool(files) == what.startswith("saved")


@pytest.mark.parametrize("during", [5, 6])
def test_a_signal_in_the_last_steps_does_not_hang(ranks: Pools, tmp_path: Path, during: int) -> None:
    """During step 5 of 6 it is agreed on after the last; during the last there is nobody to tell any more."""
    status = {5: 0, 6: None}[during]
    for step, left, files, _ in ranks(2).run(_stopped, during, tmp_path, "--max_steps", 6):
        assert (step, left, files) == (6, status, ["00006_meta.pt", "00006_model.pt"])


class SignalledWithin(Trainer):
    """The last rank is asked to stop while it computes the first micro-batch of step ``during``. If the step can be left,
    that micro-batch is its last one."""

    during = 4

    def _loss(self, batch: Batch) -> LossSums:
        last = self.state.rank == self.state.layout.world_size - 1 and torch.is_grad_enabled()
        assert not (last and self.guards._request.received and self.guards.acts_within_steps)
        losses = super()._loss(batch)
        if last and self.step + 1 == self.during and not self.guards._request.received:
            signal.raise_signal(signal.SIGINT)
            while not self.guards._request.received:
                time.sleep(0.001)
        return losses


def _stopped_within(during: int, log_dir: Path, long: float, *flags: object) -> Any:
    """``_stopped`` in a step of several micro-batches; steps of more than ``long`` seconds are long ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "LONG_STEP_SECONDS", long)
        return _stopped(during, log_dir, *flags, cls=SignalledWithin)


# Eight micro-batches a step on one rank, four on two; dropout and buffers that count must be as if nothing had begun.
WITHIN = (
    *("--max_steps", 6, "--log_every", 1, "--dropout", 0.2, "--do_val", "--val_every_steps", 2),
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8),
    *("--moe_bias_update_rate", 0.01, "--batch_size", 1),
)


@pytest.mark.parametrize("world", [1, 2])
def test_a_long_step_is_left_between_micro_batches(ranks: Pools, tmp_path: Path, world: int) -> None:
    said = "step 3 | stopped by Ctrl-C in step 4, which does not count: saved; run the same command again to resume"
    files = ["00003_meta.pt", "00003_model.pt"]
    assert ranks(world).run(_stopped_within, 4, tmp_path, 0.0, *WITHIN) == [(3, 130, files, said)] * world
    assert list(losses(train_log(tmp_path))) == [1, 2, 3]
    unbroken = ranks(world).run(run_until, tmp_path / "unbroken", 0, *WITHIN)
    resumed = ranks(world).run(run_until, tmp_path, 0, *WITHIN)
    assert resumed[0].log == unbroken[0].log
    assert [untimed(r.records) for r in resumed] == [untimed(r.records) for r in unbroken]
    ours, theirs = whole(resumed), whole(unbroken)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


def _going_on(log_dir: Path, *flags: object) -> Run:
    """The run of a trainer, as in a notebook, that was stopped in step 4 and trains on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "LONG_STEP_SECONDS", 0.0)
        trainer = SignalledWithin(config_of(*TINY, "--log_dir", log_dir, *flags))
        with pytest.raises(SystemExit):
            trainer.train()
        trainer.during = 0
        trainer.train()
    return Run(trainer.log_dir, trainer.step, *read_logs(trainer.log_dir), None)


def test_the_same_trainer_may_go_on(ranks: Pools, tmp_path: Path) -> None:
    unbroken = ranks(1).run(run_until, tmp_path / "unbroken", 0, *WITHIN)[0]
    (found,) = ranks(1).run(_going_on, tmp_path, *WITHIN)
    assert untimed(found.records) == untimed(unbroken.records)


def test_a_first_step_that_is_left_has_nothing_to_save(ranks: Pools, tmp_path: Path) -> None:
    said = "step 0 | stopped by Ctrl-C in step 1, which does not count: there is nothing to save yet; "
    said += "run the same command again to begin"
    assert ranks(2).run(_stopped_within, 1, tmp_path, 5.0, *WITHIN) == [(0, 130, [], said)] * 2


def test_a_step_that_is_left_saves_nothing_twice(ranks: Pools, tmp_path: Path) -> None:
    flags = (*WITHIN, "--save_every_steps", 2, "--log_every", 2)
    said = "step 2 | stopped by Ctrl-C in step 3, which does not count: saved; run the same command again to resume"
    found = ranks(2).run(_stopped_within, 3, tmp_path, 0.0, *flags)
    assert found == [(2, 130, ["00002_meta.pt", "00002_model.pt"], said)] * 2


def test_a_short_step_is_finished(ranks: Pools, tmp_path: Path) -> None:
    for step, status, *_ in ranks(2).run(_stopped_within, 4, tmp_path, 100.0, *WITHIN):
        assert (step, status) == (5, 130)


# Spikes.

SPIKES: tuple[object, ...] = ("--spike_sigma", 8, "--spike_window", 6, "--lr_schedule", "constant")


class Spiking(StoppingTrainer):
    """In step ``spike`` the loss of the last rank is much larger than it should be."""

    spike = 9
    weights: list[list[torch.Tensor]]

    def _loss(self, batch: Batch) -> LossSums:
        losses = super()._loss(batch)
        leaps = self.step + 1 == self.spike and self.state.rank == self.state.layout.world_size - 1
        return losses._replace(token=losses.token * 50) if leaps and torch.is_grad_enabled() else losses

    def train_step(self, microbatches: list[Batch]) -> None:
        super().train_step(microbatches)
        self.optimizer.finish_gather()
        self.weights = [*getattr(self, "weights", []), [p.detach().clone() for p in self.raw_model.parameters()]]

    def report(self) -> dict[str, Any]:
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return {
            "unchanged": [i for i, (a, b) in enumerate(pairs, 2) if all(map(torch.equal, a, b))],
            "skipped": int(self.optimizer.skipped_steps),
        }


@WORLDS
def test_a_spike_on_one_rank_is_skipped_on_all(ranks: Pools, tmp_path: Path, world: int) -> None:
    results = ranks(world).run(train, Spiking, tmp_path, "--max_steps", 12, *SPIKES)
    for result in results:
        assert result.extra == {"unchanged": [9], "skipped": 1}
    assert results[0].records[-1]["skipped_steps"] == 1
    off = ranks(world).run(train, Spiking, tmp_path / "off", "--max_steps", 12)
    assert off[0].extra == {"unchanged": [], "skipped": 0}


def test_stop_saves_and_says_where_and_why(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 20, *SPIKES, "--spike_action", "stop", "--log_every", 5)
    said = ranks(2).run(user_error, Spiking, tmp_path, *flags)
    assert said[0] == said[1]
    assert said[0].startswith("TrainingError: step 9: loss ")
    for part in ("the mean + --spike_sigma 8 x", "the last --spike_window 6", "--spike_action stop ends the run"):
        assert part in said[0]
    last = json.loads((next(tmp_path.glob("tiny_*")) / "messages.jsonl").read_text().splitlines()[-1])
    assert last["text"] == said[0].replace("TrainingError", "error", 1)
    value, limit = (float(said[0].split(word)[1].split()[0].rstrip(",")) for word in ("loss ", "exceeds "))
    log = losses(train_log(tmp_path))
    assert list(log) == list(range(1, 11))  # the next report
    assert value == pytest.approx(log[9], rel=1e-5)
    assert max(loss for step, loss in log.items() if step != 9) < limit < value
    result = ranks(2).run(train, Trainer, tmp_path, *flags)[0]  # the same command, without the spike
    assert list(losses(result.log)) == list(range(1, 21))
    assert result.records[-1]["skipped_steps"] == 1


def test_a_resumed_run_skips_the_same_steps(ranks: Pools, tmp_path: Path) -> None:
    """So tight that many steps are rejected, and each decision depends on those before."""
    flags = ("--max_steps", 30, "--save_every_steps", 5, "--spike_sigma", 0.5, "--spike_window", 9)
    flags = (*flags, "--mock_data_num_samples", 64)
    unbroken = ranks(2).run(run_until, tmp_path / "unbroken", 0, *flags)
    for stop in (12, 21, 0):  # resumed from 10 and 20
        broken = ranks(2).run(run_until, tmp_path / "broken", stop, *flags)
    assert broken[0].log == unbroken[0].log
    mine, theirs = whole(broken), whole(unbroken)
    assert mine.keys() == theirs.keys()
    assert all((mine[key] == theirs[key]).all() for key in theirs)
    assert 5 < unbroken[0].records[-1]["skipped_steps"] < 25
    meta = [torch.load(runs[0].folder / "00030_meta.pt", weights_only=True) for runs in (broken, unbroken)]
    assert meta[0]["guard"] == meta[1]["guard"]
    assert meta[0]["counters"] == meta[1]["counters"]


def test_a_checkpoint_without_a_window_starts_a_new_one(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 4, "--save_every_steps", 2)
    ranks(2).run(run_until, tmp_path, 2, *flags)
    result = ranks(2).run(run_until, tmp_path, 0, *flags, "--spike_sigma", 8)[0]
    meta = torch.load(result.folder / "00004_meta.pt", weights_only=True)
    assert len(meta["guard"]["values"]["loss"]) == 2


# Replicas.


class Flipping(Trainer):
    """A bit of one rank's weights flips after step 4."""

    def train_step(self, microbatches: list[Batch]) -> None:
        super().train_step(microbatches)
        if self.step + 1 == 4 and self.state.rank == 1:
            self.optimizer.finish_gather()
            self.raw_model.get_parameter("blocks.1.mlp_norm.weight").data[3] *= 1 + 2**-20


def test_replicas_are_checked_at_the_interval(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 6, "--no-use_distributed_optimizer")
    says = "TrainingError: step {}: the replicas diverged in their dense parameters"
    for every in (2, 3):
        said = ranks(2).run(user_error, Flipping, tmp_path / str(every), *flags, "--replica_check_every", every)
        assert said[0] == said[1]
        assert said[0].startswith(says.format({2: 4, 3: 6}[every]))
        assert "there is no majority among ranks 0 | 1; rerun" in said[0]
    assert ranks(2).run(user_error, Flipping, tmp_path / "off", *flags) == ["", ""]
    assert ranks(2).run(user_error, Trainer, tmp_path / "fine", *flags, "--replica_check_every", 1) == ["", ""]


# The watchdog.


class Slow(Trainer):
    """Takes its time in the first step and in validation, which is no stall, and after step 3, which is one."""

    def _loss(self, batch: Batch) -> LossSums:
        if self.step == 0 or not torch.is_grad_enabled():
            time.sleep(0.25)  # for each micro-batch
        return super()._loss(batch)

    def _maybe_save(self) -> None:
        super()._maybe_save()
        if self.step == 3:
            time.sleep(0.9)


def test_the_watchdog_is_silent_in_the_first_step_and_in_validation(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 3, "--do_val", "--val_every_steps", 1, "--step_timeout", 0.4)
    result = ranks(1).run(train, Slow, tmp_path, *flags)[0]
    text = (result.folder / "stacks_rank0.txt").read_text()
    assert text.count("no step completed") == 1
    assert "after step 3; is outside of Tinytron" not in text
    assert "after step 3; is at tinytron/training/trainer.py" in text
    recorded = json.loads((result.folder / "collectives_rank0.json").read_text())
    assert "entries" in recorded
