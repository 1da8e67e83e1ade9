"""Saves that were cut short are never picked up, and damaged files are one clear error on every rank."""

from __future__ import annotations

import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.helpers.mutants import Mutant, mutated
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, losses, user_error
from tests.helpers.stopping import Died, StoppingTrainer, plain, run_until, said_until
from tinytron.checkpoint import CheckpointFiles, complete_checkpoints, load, newest_checkpoint, save
from tinytron.checkpoint.load import read_meta
from tinytron.errors import CheckpointError
from tinytron.training import Trainer

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

SAVE = "tinytron.checkpoint.save:write_checkpoint"
CUTS = {
    "before anything": ("agree(lambda: _clear(files)", "die()\n    agree(lambda: _clear(files)"),
    "before the model": ("sums = agree(", "die()\n    sums = agree("),
    "before the states": ("sums |= ", "die()\n    sums |= "),
    "before the metadata": ("meta = replace(", "die()\n    meta = replace("),
}


def _die_while_saving(cut: str, log_dir: Path, *flags: object, cls: type[StoppingTrainer] = StoppingTrainer) -> None:
    """Die in the first save. A job for the pool."""
    save.die = die  # type: ignore[attr-defined]
    with mutated(Mutant(SAVE, *CUTS[cut])):
        run_until(log_dir, 0, *flags, cls=cls)


def die() -> None:
    raise Died


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.sample(4)
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
        if self.master_process and self.step == 2:
            (self.log_dir / "00002_meta.pt").write_bytes((self.log_dir / "kept").read_bytes())
        return super().save()


def _die_saving_over_metadata(log_dir: Path) -> None:
    _die_while_saving("before the metadata", log_dir, *FLAGS, cls=PutBack)


def test_what_a_killed_save_left_is_removed_at_the_next_start(ranks: Pools, copy: Path) -> None:
    ranks(2).run(_die_while_saving, "before the metadata", copy, *FLAGS)
    folder = _run_folder(copy)
    left = ["00001_meta.pt.tmp", "00004_model.pt", "00004_opt", "00012_model.pt.tmp"]
    for name in (left[0], left[3]):
        (folder / name).write_bytes(b"half")
    kept = [
        "00002_model.pt",
        "00002_meta.pt",
        "00002_opt",
        "00002_consolidated.pt",
        "00003_opt",
        "4_model.pt",
        "note.tmp",
    ]
    for name in kept[3:]:
        (folder / name).write_bytes(b"the user's")  # a file where a save makes a folder, say
    kept.append("00005_model.pt")
    (folder / kept[-1]).mkdir()
    assert all((folder / name).exists() for name in left + kept)
    said = ranks(2).run(said_until, copy, 3, *FLAGS, "--save_every_steps", 5)[0][1]
    assert f"removed what interrupted saves left behind: {', '.join(left)} (" in said
    assert not any((folder / name).exists() for name in left)
    assert all((folder / name).exists() for name in kept)
    assert "removed" not in ranks(2).run(said_until, copy, 3, *FLAGS)[0][1]


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


# Damage beside an undamaged checkpoint.


@pytest.fixture(scope="module")
def two(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks with checkpoints 2 and 4 that died before its fifth step."""
    folder = tmp_path_factory.mktemp("two")
    ranks(2).run(run_until, folder, 4, *FLAGS, "--max_steps", 6)
    return folder


@pytest.mark.parametrize("file", ["00004_model.pt", "00004_meta.pt", "00004_opt/.metadata", "00004_opt/__1_0.distcp"])
@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.sample(4)
def test_one_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(
    ranks: Pools, two: Path, tmp_path: Path, file: str, where: float
) -> None:
    shutil.copytree(two, tmp_path / "log")
    path = _run_folder(tmp_path / "log") / file
    content = bytearray(path.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)
    result, said = ranks(2).run(said_until, tmp_path / "log", 0, *FLAGS, "--max_steps", 6)[0]
    if "resuming after step 4" not in said or not file.endswith("meta.pt"):  # a zip has gaps whose content is nothing
        assert f"error: {path} cannot be read" in said
        assert "using the previous checkpoint" in said
        assert "resuming after step 2" in said
    unbroken = ranks(2).run(run_until, tmp_path / "unbroken", 0, *FLAGS, "--max_steps", 6)[0]
    assert result.log == unbroken.log


def test_every_flipped_bit_of_the_metadata_is_noticed_or_changes_nothing(two: Path) -> None:
    path = CheckpointFiles(_run_folder(two), 4).meta
    content, expected = path.read_bytes(), plain(read_meta(path).as_dict())
    noticed = 0
    for place in range(0, len(content), 41):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert plain(read_meta(path).as_dict()) == expected
        except CheckpointError:
            noticed += 1
    path.write_bytes(content)
    assert noticed > len(content) / 41 / 2


def test_without_an_undamaged_checkpoint_nothing_starts_anew(ranks: Pools, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "log")
    for step in (2, 4):
        _truncate(_run_folder(tmp_path / "log") / f"{step:05d}_model.pt")
    first, second = ranks(2).run(user_error, Trainer, tmp_path / "log", *FLAGS, "--max_steps", 6)
    assert first == second
    assert "00004_model.pt cannot be read (it has" in first
    assert "pass --no-resume to start over" in first


def test_the_checkpoint_before_is_only_announced_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(files: CheckpointFiles, _: object) -> None:
        raise CheckpointError(f"{files.step} is damaged")

    monkeypatch.setattr(load, "read_verified", read)
    found, said = [CheckpointFiles(tmp_path, step) for step in (4, 2)], list[str]()
    with pytest.raises(CheckpointError, match=r"^4 is damaged; no undamaged checkpoint is left"):
        load.first_undamaged(found, cast(Any, None), said.append)
    assert said == ["error: 4 is damaged; using the previous checkpoint"]


# A disk that refuses.


@pytest.mark.parametrize("blocked", ["00002_model.pt.tmp", "00002_meta.pt.tmp", "00002_opt"])
@pytest.mark.parametrize("mode", ["--async_save", "--no-async_save"])
@pytest.mark.sample(3)
def test_training_goes_on_when_the_disk_refuses_a_save(ranks: Pools, tmp_path: Path, blocked: str, mode: str) -> None:
    ranks(2).run(run_until, tmp_path, 1, *FLAGS)
    path = _run_folder(tmp_path) / blocked
    path.write_bytes(b"in the way") if blocked.endswith("opt") else path.mkdir()
    result, said = ranks(2).run(said_until, tmp_path, 0, *FLAGS, mode)[0]
    assert "error: checkpoint 2 was NOT saved (" in said
    assert blocked in said
    assert result.step == 4
    assert [files.step for files in complete_checkpoints(result.folder)] == [4]


def test_a_last_save_that_fails_is_an_error_of_the_run(ranks: Pools, tmp_path: Path) -> None:
    ranks(2).run(run_until, tmp_path, 1, *FLAGS)
    (_run_folder(tmp_path) / "00004_model.pt.tmp").mkdir()
    first, second = ranks(2).run(user_error, Trainer, tmp_path, *FLAGS)
    assert first == second
    assert first.startswith("CheckpointError: checkpoint 4 was NOT saved (")
    assert first.endswith("free disk space and run the same command again")
    assert [files.step for files in complete_checkpoints(_run_folder(tmp_path))] == [2]


def _small_files(log_dir: Path, limit: int) -> tuple[Run, str]:
    """While a checkpoint is written no file may grow beyond ``limit`` bytes: to a program that is a full disk."""
    write = save.write_checkpoint

    def limited(*args: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_checkpoint", limited)
        return said_until(log_dir, 2, *FLAGS, "--no-async_save")


@pytest.mark.parametrize("limit", [5000, 26000])  # too small for the weights, for a rank's states
def test_training_goes_on_on_a_full_disk(ranks: Pools, tmp_path: Path, limit: int) -> None:
    _, said = ranks(2).run(_small_files, tmp_path, limit)[0]
    assert "error: checkpoint 2 was NOT saved (" in said
    assert "File too large" in said
    assert not complete_checkpoints(_run_folder(tmp_path))
    result = ranks(2).run(run_until, tmp_path, 0, *FLAGS)[0]
    unbroken = ranks(2).run(run_until, tmp_path / "unbroken", 0, *FLAGS)[0]
    assert result.log == unbroken.log


class Removes(StoppingTrainer):
    """Somebody removes the run's folder during the second step."""

    def _maybe_log(self) -> None:
        if self.step == 2 and self.master_process:
            shutil.rmtree(self.log_dir)
        super()._maybe_log()


def test_training_goes_on_when_its_folder_is_removed(ranks: Pools, tmp_path: Path) -> None:
    result = ranks(2).run(_removed, tmp_path)[0]
    assert result.step == 4
    assert list(losses(result.log)) == [2, 3, 4]
    assert [files.step for files in complete_checkpoints(result.folder)] == [4, 2]


def _removed(log_dir: Path) -> Run:
    return run_until(log_dir, 0, *FLAGS, cls=Removes)
