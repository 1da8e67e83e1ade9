"""Shards that a script makes once: found whole the second time, repaired when damaged, named by what they are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import contents, make_texts, make_tokenizer, tokenize, tokens_of, write_jsonl
from tinytron.data import Shard, TokenShardDataset, find_shards
from tinytron.data.formats import write_shard
from tinytron.data.manifest import MANIFEST
from tinytron.errors import DataError
from tinytron.text.sources import file_states
from tinytron.text.state import recipe_hash
from tinytron.text.tokenize import finished

TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder


def test_every_token_is_a_label(made: Path, tmp_path: Path) -> None:
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path, "--num_tokens_per_file", 10**6)
    dataset = TokenShardDataset([Shard(p) for p in find_shards(str(tmp_path), "train")], seq_len=16, vocab_size=400)
    labels = [int(label) for sample in range(len(dataset)) for label in dataset[sample]["labels"]]
    assert labels == tokens_of(tmp_path)[1 : len(labels) + 1]
    assert len(labels) > len(tokens_of(tmp_path)) - 17


def test_a_folder_is_finished_when_all_its_shards_are_there(made: Path, tmp_path: Path) -> None:
    args = (made / "c.jsonl", made / "tokenizer.json", tmp_path / "deep" / "cache")
    assert finished(args[2]) is None
    tokenize(*args, "--max_file_index", 0)
    assert finished(args[2]) is None
    manifest = tokenize(*args, say=lambda _: None).manifest
    assert finished(args[2]) == manifest is not None


def _truncate(folder: Path) -> None:
    path = folder / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / MANIFEST).write_text('{"shards'),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / "train_000001.bin").unlink(),
        _truncate,
        lambda folder: write_shard(folder / "train_000001.bin", [1]),
        lambda folder: write_shard(folder / "train_000099.bin", [1]),
    ],
    ids=["torn manifest", "list", "lost", "truncated", "other size", "one too many"],
)
def test_a_folder_that_is_not_whole_is_made_again(made: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    args = (made / "c.jsonl", made / "tokenizer.json", tmp_path)
    tokenize(*args)
    before = contents(tmp_path)
    damage(tmp_path)
    assert finished(tmp_path) is None
    assert tokenize(*args, repair=True).fresh
    assert contents(tmp_path) == before
    assert not tokenize(*args, repair=True).fresh


def test_shards_of_others_are_not_touched(made: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "train_000000.bin", [1, 2])
    with pytest.raises(DataError, match="contains shards from elsewhere; use another folder"):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path, repair=True)
    assert tokens_of(tmp_path) == [1, 2]


def test_file_states_change_with_a_file_and_ignore_names_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    one, two = tmp_path / "folder" / "sub" / "one.txt", tmp_path / "two.txt"
    one.write_text("1")
    two.write_text("22")
    before = file_states([two, tmp_path / "folder", Path("gpt2-on-the-hub")])
    assert [(Path(path).name, size) for path, size, _ in before] == [("two.txt", 2), ("one.txt", 1)]
    os.utime(one, ns=(0, 5))
    after = file_states([two, tmp_path / "folder"])
    assert after[0] == before[0]
    assert after[1] == [*before[1][:2], 5]
    assert recipe_hash({"files": before}) != recipe_hash({"files": after})
    assert recipe_hash({"a": 1, "b": 2}) == recipe_hash({"b": 2, "a": 1})
