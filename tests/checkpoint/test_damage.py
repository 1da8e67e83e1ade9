"""Saves that were cut short are never picked up, and damaged files are one clear error on every rank."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.mutants import Mutant, mutated
from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses, user_error
from tests.helpers.stopping import Died, StoppingTrainer, run_until
from tinytron.checkpoint import CheckpointFiles, newest_checkpoint, save
from tinytron.training import Trainer, trainer

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = ("--max_steps", 4, "--save_every_steps", 2, "--log_every", 1)


@pytest.fixture(scope="module")
def saved(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks that died after its third step: checkpoint 2 is there. Copied by the tests, never changed."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(run_until, folder, 3, *FLAGS)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A run folder's parent with that checkpoint."""
    shutil.copytree(saved, tmp_path / "log")
    return tmp_path / "log"


def _run_folder(log_dir: Path) -> Path:
    (folder,) = (p for p in log_dir.iterdir() if p.is_dir())
    return folder


# Saves that were cut short.

SAVE = "tinytron.checkpoint.save:save_checkpoint"
CUTS = {
    "before anything": ("together(lambda: _clear(files)", "die()\n    together(lambda: _clear(files)"),
    "before the model": ("together(lambda: _write(files.model", "die()\n    together(lambda: _write(files.model"),
    "before the states": ("save_optimizer_state(optimizer, ", "die()\n    save_optimizer_state(optimizer, "),
    "before the metadata": ("record = {", "die()\n    record = {"),
}


def _die_while_saving(cut: str, log_dir: Path, *flags: object, cls: type[StoppingTrainer] = StoppingTrainer) -> None:
    """Die in the first save. A job for the pool."""
    save.die = die  # type: ignore[attr-defined]
    with mutated(Mutant(SAVE, *CUTS[cut])), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save.save_checkpoint)
        run_until(log_dir, 0, *flags, cls=cls)


def die() -> None:
    raise Died


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_save_cut_short_is_never_picked_up(
    ranks: Pools, tmp_path: Path, copy: Path, saved: Path, world: int, cut: str
) -> None:
    unbroken = ranks(world).run(run_until, tmp_path / "unbroken", 0, *FLAGS)[0]
    ranks(world).run(_die_while_saving, cut, copy, *FLAGS)
    newest = newest_checkpoint(_run_folder(copy))
    assert newest is not None
    assert newest.step == 2
    again = ranks(world).run(run_until, copy, 0, *FLAGS)[0]
    assert losses(again.log) == pytest.approx(losses(unbroken.log), rel=1e-5)
    assert newest_checkpoint(_run_folder(copy)).step == 4  # type: ignore[union-attr]


def test_an_older_checkpoint_of_the_step_does_not_lend_its_metadata(ranks: Pools, copy: Path) -> None:
    """Step 2 is saved again in a run started from nothing; the save dies: the old metadata must not vouch for it."""
    (_run_folder(copy) / "00002_meta.pt").rename(_run_folder(copy) / "kept")  # so that the run starts anew
    ranks(2).run(_die_saving_over_metadata, copy)
    assert newest_checkpoint(_run_folder(copy)) is None


class PutBack(StoppingTrainer):
    """Finds complete metadata of the step it is about to save."""

    def save(self) -> CheckpointFiles:
        if self.master_process:
            (self.log_dir / "00002_meta.pt").write_bytes((self.log_dir / "kept").read_bytes())
        return super().save()


def _die_saving_over_metadata(log_dir: Path) -> None:
    _die_while_saving("before the metadata", log_dir, *FLAGS, cls=PutBack)


@pytest.mark.parametrize("missing", ["00002_model.pt", "00002_meta.pt", "00002_opt", "00002_opt/.metadata"])
def test_a_missing_part_means_no_checkpoint(ranks: Pools, copy: Path, missing: str) -> None:
    path = _run_folder(copy) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = ranks(2).run(run_until, copy, 1, *FLAGS)[0]
    assert result.step == 1  # started anew
    assert list(losses(result.log)) == [1]


# Damaged files.


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def _garbage_at_the_start(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(b"\x80\x02garbage!" + content[10:])


def _pickle_of_something_else(path: Path) -> None:
    content = ["neither", "weights", "nor", "metadata"]
    path.write_bytes(pickle.dumps(content)) if path.name == ".metadata" else torch.save(content, path)


DAMAGES = [_truncate, _empty, _garbage, _garbage_at_the_start, _pickle_of_something_else]
FILES = ["00002_model.pt", "00002_meta.pt", "00002_opt/.metadata", "00002_opt/__1_0.distcp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=[d.__name__.strip("_") for d in DAMAGES])
def test_a_damaged_file_is_one_error_on_every_rank(
    ranks: Pools, copy: Path, damage: Callable[[Path], None], file: str
) -> None:
    damage(_run_folder(copy) / file)
    _assert_one_error(ranks(2).run(user_error, Trainer, copy, *FLAGS), file)


def test_a_missing_file_of_states_is_one_error_on_every_rank(ranks: Pools, copy: Path) -> None:
    (_run_folder(copy) / "00002_opt/__1_0.distcp").unlink()
    _assert_one_error(ranks(2).run(user_error, Trainer, copy, *FLAGS), "00002_opt")


def _assert_one_error(errors: list[str], file: str) -> None:
    assert errors[0] == errors[1]
    assert errors[0].startswith("CheckpointError: ")
    assert "\n" not in errors[0]
    assert file.split("/")[0] in errors[0]


# A disk that refuses.


@pytest.mark.parametrize("blocked", ["00002_model.pt.tmp", "00002_meta.pt.tmp", "00002_opt"])
def test_a_save_that_the_disk_refuses_is_one_error_on_every_rank(ranks: Pools, tmp_path: Path, blocked: str) -> None:
    ranks(2).run(run_until, tmp_path, 1, *FLAGS)
    path = _run_folder(tmp_path) / blocked
    path.write_bytes(b"in the way") if blocked.endswith("opt") else path.mkdir()
    first, second = ranks(2).run(user_error, Trainer, tmp_path, *FLAGS)
    assert first == second
    assert blocked in first
    assert "\n" not in first
