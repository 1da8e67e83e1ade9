"""Going back after a spike where runs are stopped, moved, profiled or spread over nodes, and with loaders of one pass."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses, train, user_error
from tests.helpers.stopping import run_until
from tests.training.test_rollback import BACK, EXPERTS, MIXED, BadData, same_run
from tests.training.test_trainer_mixture import mixture
from tinytron.data import Batch
from tinytron.errors import StorageError
from tinytron.training import Config
from tinytron.training.run import saver

Pools = Callable[[int], Ranks]


class Signalled(BadData):
    """Asked to stop in step 5."""

    def train_step(self, microbatches: list[Batch]) -> None:
        if self.step == 4 and self.state.rank == 0:
            signal.raise_signal(signal.SIGTERM)
        super().train_step(microbatches)


def _run(cls: type[BadData], folder: Path, stop_after: int, *flags: object) -> Run | None:
    with contextlib.suppress(SystemExit):
        return run_until(folder, stop_after, *flags, cls=cls)
    return None


def test_a_run_that_was_asked_to_stop_agrees(ranks: Pools, tmp_path: Path) -> None:
    """It has a checkpoint more, to which the other one cannot go back."""
    unbroken = ranks(2).run(_run, BadData, tmp_path / "a", 0, *BACK, "--save_every_steps", 0)
    assert ranks(2).run(_run, Signalled, tmp_path / "b", 0, *BACK, "--save_every_steps", 0) == [None, None]
    resumed = ranks(2).run(_run, BadData, tmp_path / "b", 0, *BACK, "--save_every_steps", 0)
    assert len(list(resumed[0].folder.glob("*_meta.pt"))) == 3
    same_run(resumed, unbroken)


@pytest.mark.parametrize(("first", "then", "stop"), [(2, 1, 13), pytest.param(1, 2, 9, marks=pytest.mark.slow)])
def test_it_goes_on_on_another_layout(ranks: Pools, tmp_path: Path, first: int, then: int, stop: int) -> None:
    flags = (*BACK, "--dropout", 0, "--batch_warmup_sizes", 48, "--batch_warmup_ends", 10)
    (unbroken,) = ranks(1).run(_run, BadData, tmp_path / "a", 0, *flags)
    ranks(first).run(_run, BadData, tmp_path / "b", stop, *flags)
    moved = ranks(then).run(_run, BadData, tmp_path / "b", 0, *flags)[0]
    for stage in ("train", "val"):
        assert losses(moved.log, stage) == pytest.approx(losses(unbroken.log, stage), rel=1e-5)
    metas = [torch.load(run.folder / "00014_meta.pt", weights_only=True) for run in (moved, unbroken)]
    assert metas[0]["skips"] == metas[1]["skips"] == [[8, 8]]


def _half_blind(folder: Path) -> Run:
    """Rank 1 does not see the newest checkpoint yet, as on a shared disk."""
    real = saver.complete_checkpoints
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(saver, "complete_checkpoints", lambda path: [files for files in real(path) if files.step < 8])
        return run_until(folder, 0, *BACK, cls=BadData)


def test_all_ranks_go_back_to_one_checkpoint(ranks: Pools, tmp_path: Path) -> None:
    same_run(ranks(2).run(_half_blind, tmp_path / "a"), ranks(2).run(_run, BadData, tmp_path / "b", 0, *BACK))


class Away(BadData):
    """The storage cannot be reached while the run goes back."""

    def _go_back(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("list", "pull", "push"):
                patch.setattr(type(self.folder.mirror.remote), name, _away)  # type: ignore[union-attr]
            super()._go_back()


def _away(*arguments: Any) -> Any:
    raise StorageError("reset by peer")


def _as_node(cls: type[BadData], folder: Path, flags: tuple[object, ...]) -> tuple[Run, list[str]]:
    """Every rank is a node with a folder of its own; only the master's has logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYTRON_CACHE", str(folder / f"node{dist.get_rank()}"))
        patch.setitem(os.environ, "LOCAL_RANK", "0")
        found = train(cls, f"local://{folder}/runs", *BACK, *flags)  # type: ignore[arg-type]
    lines = (found.folder / "messages.jsonl").read_text().splitlines() if found.log else []
    return found, [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(("world", "cls"), [(1, Away), (2, BadData)])
def test_with_a_copy_at_a_url(ranks: Pools, tmp_path: Path, world: int, cls: type[BadData]) -> None:
    """One machine needs only its own files; several fetch from each other, and lose no message."""
    (found, said), *_ = ranks(world).run(_as_node, cls, tmp_path, EXPERTS if world == 2 else ())
    assert list(losses(found.log)) == list(range(1, 15))
    assert sum("passing over 16 sequences" in line for line in said) == 1
    assert sum(line.startswith("step 8 | saved") for line in said) == 1
    assert any(line.startswith("step 4 | saved") for line in said)


class Counting(BadData):
    finished: list[int]

    def _finish_exchanges(self) -> None:
        self.__dict__.setdefault("finished", []).append(self.step)
        super()._finish_exchanges()

    def report(self) -> list[int]:
        return self.finished


def test_exchanges_end_before_the_profiler_does(ranks: Pools, tmp_path: Path) -> None:
    """It counts on when the run goes back after its tenth step, so its twelfth is step 10."""
    for run in ranks(2).run(train, Counting, tmp_path, *BACK, "--use_profiler", "--steps_to_profile", 11, 12):
        assert run.extra == [10, 10]  # before going back, and at the end of the profile
        assert len(list(run.folder.glob("rank*_trace.json"))) == 2


class OnePass(BadData):
    def _init_dataset(self, config: Config) -> None:
        self.train_loader = _batches()


def _batches() -> Iterator[Any]:
    while True:
        yield torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)


def test_data_of_one_pass_are_refused(ranks: Pools, tmp_path: Path) -> None:
    (said,) = ranks(1).run(user_error, OnePass, tmp_path, *BACK, "--no-do_val")
    text = "ConfigError: --spike_action rollback ... a generator can be read only once ... --spike_action skip"
    assert re.match(says(text), said)


def test_a_longer_run_asks_again_whether_the_data_last(ranks: Pools, tmp_path: Path) -> None:
    flags = (*BACK, *MIXED, mixture(tmp_path, (("web", 1, {"max_tokens": 17 * 96}),)), "--log_dir", tmp_path / "log")
    ranks(1).run(train, BadData, tmp_path / "log", *flags)
    (said,) = ranks(1).run(user_error, BadData, tmp_path / "log", *flags, "--max_steps", 17)
    assert said.endswith("(after spikes the run has passed over 96 tokens, which count too)")
    assert config_of(*TINY, *flags).train.max_steps == 14
