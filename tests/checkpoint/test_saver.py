"""Saving in the background: what is written is the moment of the save, whatever training does meanwhile."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses
from tests.helpers.stopping import plain, run_until, said_until
from tinytron.checkpoint import Retention, complete_checkpoints, save
from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.load import read_file
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.training import Trainer
from tinytron.training.run.folder import run_folder

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = ("--max_steps", 6, "--save_every_steps", 2, "--log_every", 1)
EXPERTS: tuple[object, ...] = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8),
    *("--ep_size", 2, "--precision", "bf16"),
)


def _late(log_dir: Path, *flags: object) -> Run:
    """Nothing is written before the training loop has done all its steps, or wants to save again."""
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, *flags))
    released, write = threading.Event(), save.write_checkpoint

    def held(*args: Any) -> None:
        assert released.wait(60), "nobody waited for this save"
        write(*args)

    finish = trainer.saver.checkpoints.finish
    trainer.saver.checkpoints.finish = lambda: (released.set(), finish())[1]  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_checkpoint", held)
        trainer.train()
    return Run(trainer.log_dir, trainer.step, "", [], None)


@pytest.mark.parametrize("flags", [(), EXPERTS], ids=["dense", "experts_bf16"])
def test_a_late_write_holds_the_state_of_its_step(ranks: Pools, tmp_path: Path, flags: tuple[object, ...]) -> None:
    saves = ("--max_steps", 6, "--save_every_steps", 4, *flags)
    late = ranks(2).run(_late, tmp_path / "late", *saves)[0].folder
    direct = ranks(2).run(run_until, tmp_path / "direct", 0, *saves, "--no-async_save")[0].folder
    for step in (4, 6):
        ours, theirs = (read_file(CheckpointFiles(folder, step).meta) for folder in (late, direct))
        assert ours.pop("run") != theirs.pop("run")  # the command line says where and how
        for meta in (ours, theirs):
            del meta["files"][f"{step:05d}_opt/.metadata"]  # holds its own path
        assert plain(ours) == plain(theirs)


def test_metadata_says_where_the_run_is(ranks: Pools, tmp_path: Path) -> None:
    folder = ranks(2).run(run_until, tmp_path, 0, *FLAGS, "--do_val", "--val_every_steps", 4)[0].folder
    metas = {files.step: read_file(files.meta) for files in complete_checkpoints(folder)}
    assert metas[4]["data_position"] == {"step": 4, "samples": 32, "tokens": 384}
    assert (metas[2]["val_loss"], metas[4]["val_loss"] is None) == (None, False)
    names = ["__0_0.distcp", "__1_0.distcp", ".metadata"]
    assert set(metas[4]["files"]) == {"00004_model.pt", *(f"00004_opt/{name}" for name in names)}
    assert len(metas[4]["rng"]) == 2
    assert metas[4]["run"]["config"]["train"]["max_steps"] == 6


def test_all_parts_are_on_the_disk_before_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, order = CheckpointFiles(tmp_path, 2), list[Path]()
    monkeypatch.setattr(save, "sync_folder", order.append)
    monkeypatch.setattr(save, "write_atomically", lambda path, _: order.append(path))
    save._commit(files, CheckpointMeta())
    assert order == [files.optimizer, tmp_path, files.meta]


def test_a_buffer_is_only_kept_for_the_same_shape_and_precision() -> None:
    buffers = HostBuffers()
    first = buffers.copy("a", torch.ones(3))
    assert buffers.copy("a", torch.zeros(3)) is first
    for tensor in (torch.full((3,), 1e-9, dtype=torch.float64), torch.ones(2, 3)):
        made = buffers.copy("a", tensor)
        assert made.dtype == tensor.dtype
        assert torch.equal(made, tensor)


# Which checkpoints stay.


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ((), [2, 4, 6, 8]),
        (("--keep_last", 1), [8]),
        (("--keep_last", 2), [6, 8]),
        (("--keep_last", 1, "--keep_every", 4), [4, 8]),
    ],
)
def test_what_is_not_to_be_kept_is_removed(
    ranks: Pools, tmp_path: Path, flags: tuple[object, ...], kept: list[int]
) -> None:
    result, said = ranks(2).run(said_until, tmp_path, 0, *FLAGS, "--max_steps", 8, *flags)[0]
    assert [files.step for files in reversed(complete_checkpoints(result.folder))] == kept
    assert {int(path.name[:5]) for path in result.folder.glob("0*")} == set(kept)
    assert all((f"removed {step}" in said) == (step not in kept) for step in (2, 4, 6, 8))


@given(
    st.dictionaries(st.integers(1, 40), st.none() | st.floats(0, 9)),
    st.integers(1, 4),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_newest_and_the_named_ones_stay(losses: dict[int, float | None], last: int, every: int, best: bool) -> None:
    gone = Retention(last, every, best).to_prune(losses)
    kept = losses.keys() - gone
    assert gone == sorted(gone)
    assert set(sorted(losses)[-last:]) <= kept
    assert not every or all(step in kept for step in losses if step % every == 0)
    known = [loss for loss in losses.values() if loss is not None]
    assert not best or not known or min(known) in [losses[step] for step in kept]
    assert len(kept) <= last + (sum(step % every == 0 for step in losses) if every else 0) + best
    assert Retention(0, every, best).to_prune(losses) == (
        Retention(1, every, best).to_prune(losses) if every or best else []
    )


def test_a_damaged_checkpoint_does_not_stop_the_removal_of_others(ranks: Pools, tmp_path: Path) -> None:
    flags = (*FLAGS, "--keep_last", 2, "--keep_best", "--do_val", "--val_every_steps", 2)
    folder = ranks(1).run(run_until, tmp_path, 4, *FLAGS, *flags)[0].folder
    shutil.copy(folder / "00004_model.pt", folder / "00002_meta.pt")  # readable, but no metadata
    (folder / "00002_meta.pt").write_bytes(b"nothing")
    result = ranks(1).run(run_until, tmp_path, 0, *flags)[0]
    assert [files.step for files in complete_checkpoints(result.folder)] == [6, 4]
    assert list(losses(result.log)) == list(range(1, 7))
    assert run_folder(config_of(*TINY, "--log_dir", tmp_path, *flags)) == folder


def test_of_equal_losses_the_earliest_is_the_best() -> None:
    assert Retention(keep_last=1, keep_best=True).to_prune({1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0}) == [1, 3]


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    losses: dict[int, float | None] = {1: 2.0, 2: 1.0, 3: math.nan}
    assert Retention(keep_last=1, keep_best=True).to_prune(losses) == [1]
    assert Retention(keep_last=1, keep_best=True).to_prune({1: math.nan, 2: math.nan, 3: None}) == [1, 2]
