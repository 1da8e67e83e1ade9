"""The remote copy of a run folder, without a run: what is there when the storage fails in between."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tests.helpers.storage import write
from tinytron.checkpoint import CheckpointFiles, Mirror, newest_checkpoint
from tinytron.errors import StorageError
from tinytron.utils.remote import RemoteFolder


def mirror_of(folder: Path, url: str) -> Mirror:
    return Mirror(folder, url, cast(Any, None), first_on_node=True)  # only ``restore`` talks to other ranks


def make(folder: Path, step: int, text: str = "") -> CheckpointFiles:
    """A checkpoint as two ranks write it, and the logs that belong to it."""
    name = f"{step:05d}"
    files = CheckpointFiles(folder, step)
    parts = {f"{name}_opt/__0_0.distcp": "a", f"{name}_opt/__1_0.distcp": "b", f"{name}_model.pt": "m"}
    write(folder, {**{part: f"{text}{value}" for part, value in parts.items()}, f"{name}_meta.pt": text})
    write(folder, {"log.txt": text or f"{step} train 1\n"})
    places = {MetadataIndex(n): _StorageInfo(f"__{n}_0.distcp", 0, 1) for n in "01"}
    (files.optimizer / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=places)))
    return files


def breaking(monkeypatch: pytest.MonkeyPatch, mirror: Mirror, method: str, at: str) -> list[str]:
    """Let ``method`` of the file system fail for names that contain ``at``; returns the names that went through."""
    real, done = getattr(mirror.remote._fs, method), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        name = str(args[1] if method == "put_file" else args[0])
        if at in name:
            raise ConnectionError("reset by peer")
        real(*args, **kwargs)
        done.append(name.split("/folder/")[-1].split("/remote/")[-1])

    monkeypatch.setattr(mirror.remote._fs, method, wrapped)
    return done


def complete_there(url: str) -> list[int]:
    return [int(name[:5]) for name in RemoteFolder(url).list() if name.endswith("_meta.pt")]


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    files = make(tmp_path, 4)
    ranks = [files.names_written_by(rank) for rank in (0, 1)]
    assert ranks[1] == ["00004_opt/__1_0.distcp"]
    assert sorted(ranks[0] + ranks[1]) == sorted(files.part_names())
    assert [p for p in files.part_names() if not (tmp_path / p).is_file()] == []


def test_a_failed_push_is_said_and_made_up_for(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror, first, second = mirror_of(tmp_path, storage), make(tmp_path, 2), make(tmp_path, 4)
    with monkeypatch.context() as patch:
        breaking(patch, mirror, "put_file", "")
        mirror.push_files(first.part_names())
        mirror.push_commit(2)
        mirror.push_logs()
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 3
        assert all(line.startswith(f"error: {storage}: cannot write ") for line in said)
        assert all("(reset by peer); training continues" in line for line in said)
    assert RemoteFolder(storage).list() == {}
    done = breaking(monkeypatch, mirror, "put_file", "nothing")
    mirror.push_files(second.part_names())
    mirror.push_commit(4)
    assert capsys.readouterr().err == ""
    assert done[-2:] == ["00002_meta.pt", "00004_meta.pt"]  # after all parts and the logs
    assert sorted(done) == sorted([*first.part_names(), *second.part_names(), "log.txt", *done[-2:]])
    third = make(tmp_path, 6)
    with monkeypatch.context() as patch:
        breaking(patch, mirror, "put_file", "_model")
        mirror.push_files(third.part_names())
    mirror.push_commit(6)
    assert complete_there(storage) == [2, 4, 6]


def test_a_checkpoint_waits_for_the_parts_of_all_ranks(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make(tmp_path, 4)
    ranks = [mirror_of(tmp_path, storage) for _ in range(2)]
    ranks[0].push_files(files.names_written_by(0))
    ranks[0].push_commit(4)
    assert "cannot write 00004_meta.pt (00004_opt/__1_0.distcp is not there yet)" in capsys.readouterr().err
    assert complete_there(storage) == []
    ranks[1].push_files(files.names_written_by(1))
    files = make(tmp_path, 6)
    for rank, mirror in enumerate(ranks):
        mirror.push_files(files.names_written_by(rank))
    ranks[0].push_commit(6)
    assert complete_there(storage) == [4, 6]


@pytest.mark.parametrize("at", ["__1_0", "_meta", "log.txt"])
def test_an_interrupted_restore_is_no_checkpoint_and_goes_on(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    pushing = mirror_of(here, storage)
    for step in (2, 4):
        pushing.push_files(make(here, step, f"new{step}").part_names())
        pushing.push_commit(step)
    make(there, 2, "old2")  # this machine had the one before, and died while it saved the next
    make(there, 4, "torn").meta.unlink()
    mirror = mirror_of(there, storage)
    with monkeypatch.context() as patch:
        breaking(patch, mirror, "get_file", at)
        with pytest.raises(StorageError, match="reset by peer"):
            mirror._restore(several_nodes=False)
    found = newest_checkpoint(there)
    assert found is not None
    assert found.step == 2
    assert (there / "log.txt").read_text() == "torn"
    done = breaking(monkeypatch, mirror, "get_file", "nothing")
    mirror._restore(several_nodes=False)
    if at == "_meta":
        assert sorted(done) == ["00004_meta.pt", "log.txt"]  # logs change, parts do not
    assert all((there / n).read_bytes() == (here / n).read_bytes() for n in CheckpointFiles(here, 4).part_names())
    assert CheckpointFiles(there, 4).complete
    assert (there / "log.txt").read_text() == "new4"
    assert not (there / ".pull").exists()


def test_a_newer_local_checkpoint(storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone := tmp_path / "alone").mkdir()
    mirror = mirror_of(alone, storage)
    mirror.push_files(make(alone, 2).part_names())
    mirror.push_commit(2)
    files = make(alone, 4)
    mirror_of(alone, storage)._restore(several_nodes=True)  # the other nodes' parts are out of reach
    assert "checkpoint 4 never reached" in capsys.readouterr().err
    assert newest_checkpoint(alone) == CheckpointFiles(alone, 2)
    assert (alone / "00004_meta.pt.unpushed").exists()
    make(alone, files.step)
    mirror_of(alone, storage)._restore(several_nodes=False)
    assert complete_there(storage) == [2, 4]


def test_what_is_here_already_is_not_fetched_again(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirror_of(tmp_path, storage)
    mirror.push_files(make(tmp_path, 2).part_names())
    mirror.push_commit(2)
    done = breaking(monkeypatch, mirror, "get_file", "nothing")
    mirror._restore(several_nodes=False)
    assert done == []
    assert capsys.readouterr().out == ""


def test_a_fetched_checkpoint_gets_its_metadata_last(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    pushing = mirror_of(here, storage)
    pushing.push_files(make(here, 4).part_names())
    pushing.push_commit(4)
    moved, replace = list[str](), os.replace

    def recorded(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("tinytron.checkpoint.mirror.os.replace", recorded)
    mirror_of(there, storage)._restore(several_nodes=False)
    assert moved[-1] == "00004_meta.pt"
    assert {"00004_model.pt", "__1_0.distcp", "log.txt"} < set(moved)


def test_a_checkpoint_that_is_removed_before_it_is_there_is_not_waited_for(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirror_of(tmp_path, storage)
    make(tmp_path, 2)
    mirror.push_commit(2)
    assert "is not there yet" in capsys.readouterr().err
    mirror.remove_checkpoint(2)
    mirror.push_commit(4)
    assert capsys.readouterr().err == ""
    assert complete_there(storage) == []


def test_a_removed_checkpoint_goes_metadata_first(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirror_of(tmp_path, storage)
    for step in (2, 4):
        mirror.push_files(make(tmp_path, step).part_names())
        mirror.push_commit(step)
    with monkeypatch.context() as patch:
        breaking(patch, mirror, "rm_file", "_meta")
        mirror.remove_checkpoint(2)
    assert "cannot delete 00002_meta.pt (reset by peer)" in capsys.readouterr().err
    assert len([name for name in RemoteFolder(storage).list() if name.startswith("00002")]) == 5
    with monkeypatch.context() as patch:
        breaking(patch, mirror, "rm_file", "_model")
        mirror.remove_checkpoint(2)
    assert "cannot delete 00002_model.pt (reset by peer)" in capsys.readouterr().err
    assert complete_there(storage) == [4]
    mirror.push_files([])  # the next save makes up for it
    assert sorted({name[:5] for name in RemoteFolder(storage).list()}) == ["00004", "log.t"]


def test_a_new_run_moves_the_old_one_aside(storage: str, tmp_path: Path) -> None:
    for number in (1, 2):
        mirror = mirror_of(tmp_path, storage)
        mirror.push_files(make(tmp_path, number).part_names())
        mirror.push_commit(number)
        mirror.set_aside()
        assert RemoteFolder(storage).list() == {}
        assert complete_there(f"{storage}.{number}") == [number]
