"""Which checkpoints of a folder there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinytron.checkpoint import CheckpointFiles, find_checkpoints, newest_checkpoint
from tinytron.checkpoint.files import checksum, remove_leftovers, verify
from tinytron.errors import CheckpointError


def _make(folder: Path, step: int, *missing: str) -> CheckpointFiles:
    files = CheckpointFiles(folder, step)
    files.optimizer.mkdir(parents=True)
    for name, path in {"model": files.model, "meta": files.meta, "opt": files.optimizer / ".metadata"}.items():
        if name not in missing:
            path.write_bytes(b"")
    return files


def test_files_have_the_documented_names() -> None:
    files = CheckpointFiles(Path("run"), 100)
    assert [str(p) for p in (files.model, files.optimizer, files.meta)] == [
        *("run/00100_model.pt", "run/00100_opt", "run/00100_meta.pt")
    ]


def test_the_newest_is_the_highest_number_not_the_last_name(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 99999, 100000):
        _make(tmp_path, step)
    assert newest_checkpoint(tmp_path) == CheckpointFiles(tmp_path, 100000)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path) -> None:
    for step in (2, 4):
        files = _make(tmp_path, step)
        for path in (files.model, files.optimizer, files.meta):
            os.utime(path, (1e9 / step, 1e9 / step))  # the later, the older
    assert newest_checkpoint(tmp_path) == CheckpointFiles(tmp_path, 4)


@pytest.mark.parametrize("missing", ["model", "opt", "meta"])
def test_an_incomplete_checkpoint_does_not_exist(tmp_path: Path, missing: str) -> None:
    _make(tmp_path, 2)
    _make(tmp_path, 4, missing)
    assert newest_checkpoint(tmp_path) == CheckpointFiles(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 is incomplete; it needs 00004_model.pt, 00004_opt/ and"):
        find_checkpoints(str(tmp_path / "00004_model.pt"))


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("best_meta.pt", "00003_meta.pt.tmp", "config.json"):
        (tmp_path / name).write_bytes(b"")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["", "00002_model.pt", "00002_meta.pt", "00002_opt", "00002_opt/"])
def test_resume_path_may_be_the_folder_or_any_part(tmp_path: Path, name: str) -> None:
    _make(tmp_path, 2)
    assert find_checkpoints(f"{tmp_path}/{name}") == [CheckpointFiles(tmp_path, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "holds no complete checkpoint"),
        ("missing", "is neither a run folder .*; use log/<run> or log/<run>/00100_model.pt"),
        ("00007_model.pt", "checkpoint 7 is incomplete"),
        ("weights.pt", "is neither a run folder nor a checkpoint file"),
    ],
)
def test_a_resume_path_that_is_no_checkpoint_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        find_checkpoints(str(tmp_path / name))
    assert "--resume_path" in str(caught.value)


def test_a_file_that_is_not_what_was_written_is_told_by_its_size_or_its_content(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"four")
    sums = {"part": checksum(path)}
    verify(tmp_path, sums, ["part"])
    for content, text in (
        (b"fou", "it has 3 bytes, but 4 were written"),
        (b"fours", "it has 5 bytes, but 4 were written"),
        (b"five", "its SHA-256 differs from the one recorded when it was written"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            verify(tmp_path, sums, ["part"])
        assert str(caught.value) == f"{path} cannot be read ({text})"


def test_a_removed_checkpoint_has_lost_its_metadata_on_the_disk_before_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[list[str]] = []

    def sync(folder: Path) -> None:
        there.append(sorted(path.name for path in folder.iterdir()))

    monkeypatch.setattr("tinytron.checkpoint.files.sync_folder", sync)
    _make(tmp_path, 2).remove()
    assert there == [["00002_model.pt", "00002_opt"]]
    assert not list(tmp_path.iterdir())


def test_a_whole_checkpoint_is_no_leftover(tmp_path: Path) -> None:
    files = _make(tmp_path, 2)
    assert remove_leftovers(tmp_path) == []
    assert files.complete


def test_a_link_to_the_states_of_elsewhere_is_no_leftover(tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    states = _make(tmp_path / "elsewhere", 2, "model", "meta").optimizer
    (run / "00002_opt").symlink_to(states)
    assert remove_leftovers(run) == []
    assert (run / "00002_opt" / ".metadata").is_file()


def test_weights_that_were_kept_alone_are_no_leftovers(tmp_path: Path) -> None:
    for step, missing in ((2, ("meta",)), (4, ("meta", "opt"))):
        _make(tmp_path, step, *missing)
    (tmp_path / "00004_opt").rmdir()
    assert [path.name for path in remove_leftovers(tmp_path)] == ["00002_model.pt", "00002_opt"]
    assert [path.name for path in tmp_path.iterdir()] == ["00004_model.pt"]
