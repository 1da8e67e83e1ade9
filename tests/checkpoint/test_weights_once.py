"""In fp32 and fp64 the weights are the main weights: a checkpoint has them once, and older ones, with both, still load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run
from tests.helpers.stopping import StoppingTrainer, run_until, whole
from tinytron.checkpoint import CheckpointFiles, optimizer_state, tools
from tinytron.checkpoint.files import bytes_of
from tinytron.checkpoint.optimizer_state import stored_states
from tinytron.errors import CheckpointError
from tinytron.training import Config

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = ("--max_steps", 4, "--save_every_steps", 2, "--log_every", 1)
WIDE = ("--hidden_size", 256, "--intermediate_size", 512)  # so that the tensors outweigh the files' headers


def _as_before(log_dir: Path, stop_after: int, *flags: object) -> Run:
    """``run_until`` with checkpoints that hold main weights in every precision, as earlier versions wrote them. A job for
    the pool."""
    with mock.patch.object(optimizer_state, "are_main", return_value=False):
        return run_until(log_dir, stop_after, *flags)


def _kinds(files: CheckpointFiles) -> set[str]:
    return {key.rsplit("/", 1)[-1] for key in stored_states(files.optimizer)}


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_main_weights_are_stored_where_the_weights_are_less_precise(
    ranks: Pools, tmp_path: Path, precision: str
) -> None:
    flags = ("--precision", precision, *WIDE, "--max_steps", 1)
    new, old = (ranks(2).run(job, tmp_path / job.__name__, 0, *flags)[0] for job in (run_until, _as_before))
    now, before = CheckpointFiles(new.folder, 1), CheckpointFiles(old.folder, 1)
    assert _kinds(before) == {"main", "exp_avg", "exp_avg_sq", "scalar.step"}
    assert _kinds(now) == _kinds(before) - (set() if precision == "bf16" else {"main"})
    ratio = bytes_of(now.parts) / bytes_of(before.parts)
    assert ratio == pytest.approx(1.0 if precision == "bf16" else 0.75, abs=0.02)
    assert tools.problems(now) == tools.problems(before) == []
    contents = [torch.load(tools.consolidate(files), weights_only=True) for files in (now, before)]
    for name, weight in contents[1]["model"].items():
        assert torch.equal(contents[0]["model"][name], weight)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 2), (2, 1)])
def test_a_checkpoint_with_both_is_continued(ranks: Pools, tmp_path: Path, saved_on: int, loaded_on: int) -> None:
    unbroken = ranks(saved_on).run(run_until, tmp_path / "unbroken", 0, *FLAGS)
    begun = ranks(saved_on).run(_as_before, tmp_path / "log", 2, *FLAGS)
    assert "main" in _kinds(CheckpointFiles(begun[0].folder, 2))
    ended = ranks(loaded_on).run(run_until, tmp_path / "log", 0, *FLAGS)
    assert "main" not in _kinds(CheckpointFiles(begun[0].folder, 4))
    mine, theirs = whole(ended), whole(unbroken)
    tolerance = 0.0 if saved_on == loaded_on else 1e-5
    for key, values in theirs.items():
        np.testing.assert_allclose(mine[key], values, rtol=tolerance, atol=tolerance, err_msg=key)


class Plain(StoppingTrainer):
    """Trains with SGD, which has no states."""

    def _init_optimizer(self, config: Config) -> None:
        self.optimizer = torch.optim.SGD(self.raw_model.parameters(), lr=0.1)  # type: ignore[assignment]


def _plain(log_dir: Path, stop_after: int) -> Run:
    return run_until(log_dir, stop_after, *FLAGS, cls=Plain)


def test_an_optimizer_without_states_continues_from_its_weights(ranks: Pools, tmp_path: Path) -> None:
    unbroken = ranks(2).run(_plain, tmp_path / "unbroken", 0)
    begun = ranks(2).run(_plain, tmp_path / "log", 3)
    files = CheckpointFiles(begun[0].folder, 2)
    assert stored_states(files.optimizer) == {}
    assert tools.problems(files) == []
    ended = ranks(2).run(_plain, tmp_path / "log", 0)
    assert ended[0].log == unbroken[0].log
    for key, values in whole(unbroken).items():
        np.testing.assert_array_equal(whole(ended)[key], values, err_msg=key)


class Frozen(StoppingTrainer):
    """Leaves the last norm as it is."""

    def _init_model(self, config: Config) -> None:
        super()._init_model(config)
        self.raw_model.get_parameter("final_norm.weight").requires_grad_(False)


def _frozen(log_dir: Path) -> Run:
    return run_until(log_dir, 2, *FLAGS, cls=Frozen)


def _thawed(log_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        run_until(log_dir, 0, *FLAGS)
    return str(caught.value)


def test_a_parameter_that_was_not_trained_has_no_state_to_continue_with(ranks: Pools, tmp_path: Path) -> None:
    folder = ranks(2).run(_frozen, tmp_path)[0].folder
    for said in ranks(2).run(_thawed, tmp_path):
        assert said == (
            f"{folder / '00002_opt'} has no optimizer state for final_norm.weight: it is from a different model or "
            "optimizer"
        )
