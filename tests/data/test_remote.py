"""Token shards behind a URL: which files come, and which do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.storage import write
from tinytron.data import write_shard
from tinytron.data.manifest import Manifest, ShardFacts, TokenizerFacts, write_manifest
from tinytron.data.remote import fetch_shards, local_dataset_path
from tinytron.data.shards import find_shards
from tinytron.errors import DataError, StorageError
from tinytron.utils.remote import RemoteFolder
from tinytron.utils.training import sha256_of

SHARDS = {"train_0.bin": "0", "train_1.bin": "1", "val_0.bin": "v", "prepared.json": "{}"}


def fetched(url: str) -> list[str]:
    fetch_shards(url)
    return sorted(p.name for p in Path(local_dataset_path(url.rpartition("/train_")[0] or url)).rglob("*"))


def test_a_folder_and_a_pattern(storage: str, tmp_path: Path) -> None:
    folder = RemoteFolder(storage)
    other = {"notes.txt": "", "old/train_9.bin": "9", "old/prepared.json": "{}"}
    folder.push(tmp_path, write(tmp_path, {**SHARDS, **other}))
    pattern = f"{storage}/train_[0]*.bin"
    assert fetched(pattern) == ["prepared.json", "train_0.bin"]
    assert [p.name for p in find_shards(local_dataset_path(pattern), "train")] == ["train_0.bin"]
    assert fetched(storage) == sorted(SHARDS)
    assert [p.name for p in find_shards(local_dataset_path(storage), "val")] == ["val_0.bin"]
    assert fetched(f"{storage}/") == sorted(SHARDS)


def test_a_shard_that_is_gone_is_not_trained_on(storage: str, tmp_path: Path) -> None:
    folder = RemoteFolder(storage)
    folder.push(tmp_path, write(tmp_path, SHARDS))
    fetch_shards(storage)
    folder.remove(["train_1.bin"])
    assert fetched(storage) == ["prepared.json", "train_0.bin", "val_0.bin"]


@pytest.mark.parametrize("end", ["", "/nowhere", "/test_*.bin"])
def test_no_shards(storage: str, tmp_path: Path, end: str) -> None:
    RemoteFolder(storage).push(tmp_path, write(tmp_path, {"notes.txt": ""}))
    with pytest.raises(DataError, match=r"--dataset_path .* matches no file; give a URL"):
        fetch_shards(f"{storage}{end}")


def test_what_belongs_to_a_shard_comes_along_and_is_checked(storage: str, tmp_path: Path) -> None:
    folder, place = RemoteFolder(storage), tmp_path / "made"
    names = write(place, {"train_0.docs": "d", "train_0.weights": "w", "train_0.pack8": "p", "train_9.docs": "x"})
    write_shard(place / "train_0.bin", range(9))
    facts = ShardFacts("train_0.bin", 9, 1, sha256_of(place / "train_0.bin"))
    tokenizer = TokenizerFacts("train_bpe", "x", "y", 9, 7, "<eot>", "append")
    rest: dict[str, Any] = {"source": {}, "options": {}, "command": "", "documents": {}, "tokens": {}}
    write_manifest(place, Manifest("uint16", "timl", tokenizer, **rest, empty=0, complete=True, shards=[facts]))
    folder.push(place, [*names, "train_0.bin", "manifest.json"])
    assert fetched(storage) == ["manifest.json", "train_0.bin", "train_0.docs", "train_0.weights"]
    write_shard(place / "train_0.bin", range(1, 10))  # as long, but not what the manifest says
    folder.push(place, ["train_0.bin"])
    local = Path(local_dataset_path(storage))
    (local / "train_0.bin").unlink()
    with pytest.raises(StorageError, match=r"train_0\.bin.*its sha256 is"):
        fetch_shards(storage)
    assert not (local / "train_0.bin").exists()
