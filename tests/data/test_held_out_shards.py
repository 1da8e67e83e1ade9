"""Validation shards by a path of their own, and shards that were renamed after they were tokenized."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import make_texts, make_tokenizer, starts_of, tokenize, write_jsonl
from tinytron.cli.main import main
from tinytron.data import EndOfText, Shard
from tinytron.data.formats import write_shard
from tinytron.data.manifest import read_manifest
from tinytron.data.shards import check_held_out, find_held_out, find_shards, open_shards
from tinytron.errors import DataError

TEXTS = make_texts(40)
FLAGS = ("--num_tokens_per_file", 200)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    tokenize(tmp_path / "c.jsonl", tmp_path / "tokenizer.json", tmp_path / "out", *FLAGS)
    return tmp_path / "out"


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def rename(folder: Path, old: str = "train_000000.bin", new: str = "validation_000000.bin") -> Path:
    return (folder / old).rename(folder / new)


# Renamed shards.


def test_a_renamed_shard_keeps_what_the_manifest_says(made: Path) -> None:
    before, starts = open_shards([made / "train_000000.bin"])[0], starts_of(made)
    (shard,) = open_shards([rename(made)])
    assert (shard.count, shard.sha256, shard.eot) == (before.count, before.sha256, before.eot)
    assert shard.vocab_size == before.vocab_size is not None
    assert shard.eot == EndOfText(0, "prepend")
    assert shard.document_starts is not None  # from the file of documents, which was not renamed
    assert shard.starts_between(0, shard.count).tolist() == [start for start in starts if start < 200]
    assert names(find_shards(str(made), "val")) == ["validation_000000.bin"]
    assert "train_000000.bin" not in names(find_shards(str(made), "train"))


def test_only_the_same_content_is_the_renamed_shard(made: Path) -> None:
    """A file of the same size and name, but with other tokens, is not trusted."""
    path = rename(made)
    write_shard(path, np.full(200, 60_000, np.uint16))
    (shard,) = open_shards([path])
    assert (shard.sha256, shard.vocab_size) == (None, None)


def test_a_copy_is_no_renamed_shard(made: Path) -> None:
    shutil.copy(made / "train_000000.bin", made / "validation_000000.bin")
    assert open_shards([made / "validation_000000.bin"])[0].sha256 is None


def test_the_tools_know_a_renamed_shard(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(made)
    assert manifest is not None
    path = rename(made)
    assert main(["data", "verify", str(made)]) == 0
    capsys.readouterr()
    assert main(["data", "info", str(made)]) == 0
    line = f"validation {manifest.shards[0].documents} documents, 200 tokens, 1 shard\n"
    assert line in capsys.readouterr().out
    rename(made, path.name, "elsewhere.txt")
    assert main(["data", "verify", str(made)]) != 0
    assert "train_000000.bin" in capsys.readouterr().out


@pytest.mark.parametrize("last", [(), ("--max_file_index", 1)])
def test_tokenizing_again_after_a_rename_finds_all_done(tmp_path: Path, last: tuple[object, ...]) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    call = (write_jsonl(tmp_path / "c.jsonl", TEXTS), tmp_path / "tokenizer.json", tmp_path / "out", *FLAGS)
    assert tokenize(*call, *last).fresh
    path = rename(tmp_path / "out")
    assert not tokenize(*call, *last).fresh
    if last:  # a call without the limit continues from there
        whole = tokenize(*call)
        assert whole.fresh
        assert whole.manifest is not None
        assert len(whole.manifest.shards) > 2
        assert main(["data", "verify", str(tmp_path / "out")]) == 0
    path.unlink()
    with pytest.raises(DataError, match=r"train_000000\.bin is missing; tokenize again with --overwrite"):
        tokenize(*call)


# Paths of their own.


def test_a_file_a_pattern_or_a_folder_of_validation_shards(tmp_path: Path) -> None:
    for name in ("a/x.bin", "a/y.bin", "b/train_0.bin", "b/val_0.bin", "b/val_1.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(find_held_out(str(tmp_path / "a"))) == ["x.bin", "y.bin"]
    assert names(find_held_out(str(tmp_path / "b"))) == ["val_0.bin", "val_1.bin"]
    assert names(find_held_out(str(tmp_path / "a" / "y.bin"))) == ["y.bin"]
    assert names(find_held_out(str(tmp_path / "b" / "*_0.bin"))) == ["train_0.bin", "val_0.bin"]
    for nothing in ("c", "b/none_*.bin", "b/val_7.bin"):
        with pytest.raises(
            DataError, match=rf"--val_dataset_path {tmp_path}/{nothing.replace('*', '.')}.* has no token"
        ):
            find_held_out(str(tmp_path / nothing))


def test_what_is_trained_on_cannot_be_held_out(made: Path) -> None:
    shards = open_shards(sorted(made.glob("train_*.bin")))
    check_held_out(shards[1:], shards[:1])
    with pytest.raises(DataError, match=r"train_000000\.bin is training data, too; .* rename it to val_000000\.bin"):
        check_held_out(shards, shards[:1])


def test_another_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other.json", special=("<eot>", "<pad>"))
    tokenize(tmp_path / "c.jsonl", tmp_path / "other.json", tmp_path / "other", *FLAGS)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "copy.json")
    tokenize(tmp_path / "c.jsonl", tmp_path / "copy.json", tmp_path / "same", *FLAGS)
    train, other, same = (open_shards(sorted(f.glob("*.bin"))) for f in (made, tmp_path / "other", tmp_path / "same"))
    check_held_out(train, same)
    write_shard(tmp_path / "unknown.bin", range(5))
    check_held_out(train, [Shard(tmp_path / "unknown.bin")])
    text = (
        rf"made with --tokenizer_path {tmp_path}/other\.json, but .* with --tokenizer_path {tmp_path}/tokenizer\.json"
    )
    with pytest.raises(DataError, match=text):
        check_held_out(train, other)
