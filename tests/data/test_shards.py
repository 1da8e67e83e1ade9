"""Which files belong to a split, and what a sample is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinytron.data import EndOfText, Shard, TokenShardDataset, find_shards, write_shard
from tinytron.data.formats import open_shard
from tinytron.data.manifest import Manifest, ShardFacts, TokenizerFacts, write_manifest
from tinytron.data.shards import open_shards, passed_over, split_of
from tinytron.errors import DataError


def shard(folder: Path, tokens: Any, name: str = "train_0.bin", dtype: Any = np.uint16) -> Path:
    write_shard(folder / name, tokens, dtype)
    return folder / name


def samples(paths: list[Path], seq_len: int, vocab_size: int) -> TokenShardDataset:
    return TokenShardDataset([Shard(path) for path in paths], seq_len, vocab_size)


def items(dataset: TokenShardDataset) -> list[tuple[list[int], list[int]]]:
    samples = [dataset[i] for i in range(len(dataset))]
    return [(s["input_ids"].tolist(), s["labels"].tolist()) for s in samples]


# Samples.


@pytest.mark.parametrize("seq_len", [1, 2, 3, 4, 5, 9])
def test_neighbors_share_one_token_and_the_remainder_is_dropped(tmp_path: Path, seq_len: int) -> None:
    tokens = list(range(100, 110))
    dataset = samples([shard(tmp_path, tokens)], seq_len, 1000)
    found = items(dataset)
    assert len(found) == 9 // seq_len
    for i, (inputs, labels) in enumerate(found):
        assert inputs == tokens[i * seq_len : (i + 1) * seq_len]
        assert labels == tokens[i * seq_len + 1 : (i + 1) * seq_len + 1]
    targets = [t for _, labels in found for t in labels]
    assert targets == tokens[1 : 1 + len(targets)]  # every token but the first is a target once
    assert 0 <= 9 - len(targets) < seq_len


def test_samples_are_int64(tmp_path: Path) -> None:
    sample = samples([shard(tmp_path, range(5))], 2, 10)[0]
    assert {t.dtype for t in sample.values()} == {torch.int64}


def test_no_sample_crosses_shards(tmp_path: Path) -> None:
    """Shards of 7, 1, 0, 5 and 4 tokens: some have a remainder, some no sample at all."""
    sizes = [7, 1, 0, 5, 4]
    paths = [shard(tmp_path, np.arange(n) + 10 * i, f"train_{i}.bin") for i, n in enumerate(sizes)]
    dataset = samples(paths, 3, 100)
    expected = [[0, 1, 2], [3, 4, 5], [30, 31, 32], [40, 41, 42]]
    assert items(dataset) == [(row, [t + 1 for t in row]) for row in expected]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_shards_of_both_dtypes_mix(tmp_path: Path) -> None:
    paths = [shard(tmp_path, [1, 2, 3], "train_0.bin"), shard(tmp_path, [4, 70000, 6], "train_1.bin", np.uint32)]
    assert items(samples(paths, 2, 70001)) == [([1, 2], [2, 3]), ([4, 70000], [70000, 6])]


def test_too_few_tokens_for_one_sample(tmp_path: Path) -> None:
    paths = [shard(tmp_path, range(3), "train_0.bin"), shard(tmp_path, [], "train_1.bin")]
    text = (
        r"no shard holds one sample of --seq_len 3 \+ 1 tokens \(train_0\.bin: 3, train_1\.bin: 0 tokens\); "
        "use a shorter --seq_len"
    )
    with pytest.raises(DataError, match=text):
        samples(paths, 3, 10)
    assert len(samples(paths, 2, 10)) == 1


# Token ids outside the vocabulary.


@pytest.mark.parametrize(("dtype", "width"), [(np.uint16, 2), (np.uint32, 4)])
@pytest.mark.parametrize("at", [0, 4, 6, 10])
def test_an_id_outside_the_vocabulary_is_named_with_its_byte(tmp_path: Path, at: int, dtype: Any, width: int) -> None:
    tokens = np.arange(11)
    tokens[at] = 500
    good, bad = shard(tmp_path, range(5), "train_0.bin"), shard(tmp_path, tokens, "train_1.bin", dtype)
    dataset = samples([good, bad], 2, 500)
    text = rf"{bad}: token id 500 at byte {1024 + width * at} is not below --vocab_size 500; use the vocabulary size"
    with pytest.raises(DataError, match=text):
        dataset.check_token_ids()
    with pytest.raises(DataError, match=text):
        items(dataset)
    items(samples([good, bad], 2, 501))
    samples([good, bad], 2, 501).check_token_ids()


def test_each_part_checks_its_own_shards(tmp_path: Path) -> None:
    paths = [shard(tmp_path, [1, 500 if i == 4 else 1], f"train_{i}.bin") for i in range(6)]
    dataset = samples(paths, 1, 500)
    for part in (0, 2):
        dataset.check_token_ids(part=part, parts=3)
    with pytest.raises(DataError, match=r"train_4\.bin: token id 500 at byte 1026"):
        dataset.check_token_ids(part=1, parts=3)


def test_the_check_of_a_long_shard_is_spread_over_it(tmp_path: Path) -> None:
    block = 2**20
    tokens = np.zeros(4 * block, np.uint16)
    tokens[-1] = 500
    dataset = samples([shard(tmp_path, tokens)], 8, 500)
    with pytest.raises(DataError, match=f"at byte {1024 + 2 * (4 * block - 1)}"):
        dataset.check_token_ids()
    dataset.check_token_ids(limit=2 * block)  # blocks 0 and 2 of 4
    tokens[2 * block] = 600
    dataset = samples([shard(tmp_path, tokens)], 8, 500)
    with pytest.raises(DataError, match=f"token id 600 at byte {1024 + 2 * 2 * block}"):
        dataset.check_token_ids(limit=2 * block)


# Finding shards.


def test_a_folder_gives_its_splits_in_order(tmp_path: Path) -> None:
    train = ["fineweb_train_000001.bin", "train.bin", "train_000002.bin", "train_000010.bin"]
    val = ["fineweb_val_000000.bin", "val_000000.bin", "validation_000000.bin"]
    for name in (*reversed(train), *val, "test_0.bin", "train_0.txt", "constrain_0.bin", "train_0.docs", "trainer.bin"):
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(str(tmp_path), "train")] == train
    assert [p.name for p in find_shards(str(tmp_path), "val")] == val


def test_a_pattern_or_a_file_is_training_data(tmp_path: Path) -> None:
    for name in ("b.bin", "a.bin", "c.txt"):
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*.bin")
    assert [p.name for p in find_shards(pattern, "train")] == ["a.bin", "b.bin"]
    assert find_shards(pattern, "val") == []
    assert find_shards(str(tmp_path / "c.txt"), "train") == [tmp_path / "c.txt"]


def test_a_pattern_may_match_both_splits(tmp_path: Path) -> None:
    for name in (
        "val_000001.bin",
        "fineweb_val.bin",
        "train_000001.bin",
        "a.bin",
        "train_000000.bin",
        "interval_0.bin",
    ):
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*.bin")
    assert [p.name for p in find_shards(pattern, "val")] == ["fineweb_val.bin", "val_000001.bin"]
    train = ["a.bin", "interval_0.bin", "train_000000.bin", "train_000001.bin"]
    assert [p.name for p in find_shards(pattern, "train")] == train
    assert find_shards(str(tmp_path / "train_*.bin"), "val") == []
    with pytest.raises(
        DataError, match=r"val_\*\.bin matches only held-out files, such as fineweb_val|val_000001\.bin; .*"
    ):
        find_shards(str(tmp_path / "val_*.bin"), "train")


def test_a_folder_without_validation_data_is_fine_but_not_without_training_data(tmp_path: Path) -> None:
    (tmp_path / "val_0.bin").touch()
    with pytest.raises(DataError, match=rf"--dataset_path {tmp_path} has no train_\*\.bin; name a folder"):
        find_shards(str(tmp_path), "train")
    (tmp_path / "val_0.bin").rename(tmp_path / "train_0.bin")
    assert find_shards(str(tmp_path), "val") == []


def test_a_path_that_matches_nothing(tmp_path: Path) -> None:
    text = rf"--dataset_path {tmp_path}/none is not a folder and matches no file; give a folder with train_\*\.bin"
    with pytest.raises(DataError, match=text):
        find_shards(f"{tmp_path}/none", "train")


# Identity.


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    def fingerprint(tokens: Any, folder: str = "a", seq_len: int = 2, dtype: Any = np.uint16) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return samples([shard(tmp_path / folder, tokens, dtype=dtype)], seq_len, 2**16).fingerprint()

    same = fingerprint(range(9))
    assert same.startswith("shards:")
    assert fingerprint(range(9), folder="b") == same
    others = {
        fingerprint(range(10)),
        fingerprint([*range(8), 0]),
        fingerprint(range(9), seq_len=3),
        fingerprint(range(9), dtype=np.uint32),
    }
    assert len(others | {same}) == 5


# Manifests.


def with_manifest(folder: Path, *shards: Path, vocab_size: int = 100) -> None:
    facts = [ShardFacts(path.name, len(open_shard(path)), 1, f"hash of {path.name}") for path in shards]
    tokenizer = TokenizerFacts("train_bpe", "x", "y", vocab_size, 7, "<eot>", "append")
    rest: dict[str, Any] = {"source": {}, "options": {}, "command": "", "documents": {}, "tokens": {}}
    write_manifest(folder, Manifest("uint16", "timl", tokenizer, **rest, empty=0, complete=True, shards=facts))


def test_what_a_manifest_says_is_not_read_from_the_shards(tmp_path: Path) -> None:
    paths = [shard(tmp_path, range(10 + n), f"train_{n}.bin") for n in range(2)]
    with_manifest(tmp_path, *paths)
    contents = [path.read_bytes() for path in paths]
    for path in paths:  # not even a header
        path.write_bytes(bytes(path.stat().st_size))
    opened = open_shards(paths)
    dataset = TokenShardDataset(opened, 3, 100)
    assert [s.count for s in opened] == [10, 11]
    assert len(dataset) == 3 + 3
    dataset.check_token_ids()
    name = dataset.fingerprint()
    with pytest.raises(DataError, match="magic number 0 at byte 0"):
        dataset[0]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert items(TokenShardDataset(open_shards(paths), 3, 100)) == items(samples(paths, 3, 100))
    assert TokenShardDataset(open_shards(paths), 3, 100).fingerprint() == name
    assert opened[0].eot == EndOfText(7, "append")
    assert open_shards(paths, eot=EndOfText(3))[0].eot == EndOfText(3)


def test_a_shard_that_is_not_as_its_manifest_says_is_refused(tmp_path: Path) -> None:
    paths = [shard(tmp_path, range(10), f"train_{n}.bin") for n in range(2)]
    with_manifest(tmp_path, *paths)
    shard(tmp_path, range(9), "train_1.bin")
    with pytest.raises(DataError, match=r"train_1\.bin: 1042 bytes, but 10 tokens in its manifest\.json make 1044"):
        open_shards(paths)
    write_shard(paths[1], range(5), np.uint32)  # as many bytes, another type
    with pytest.raises(DataError, match=r"train_1\.bin: 5 tokens, but manifest\.json says 10; tokenize again"):
        TokenShardDataset(open_shards(paths), 3, 100)[4]


def test_a_vocabulary_larger_than_the_models_is_no_voucher(tmp_path: Path) -> None:
    paths = [shard(tmp_path, range(40, 60))]
    with_manifest(tmp_path, *paths, vocab_size=100)
    TokenShardDataset(open_shards(paths), 3, 60).check_token_ids()
    with pytest.raises(DataError, match="token id 59 at byte 1062 is not below --vocab_size 59"):
        TokenShardDataset(open_shards(paths), 3, 59).check_token_ids()


def test_shards_beside_those_of_a_manifest_are_read(tmp_path: Path) -> None:
    paths = [shard(tmp_path, range(10), f"train_{n}.bin") for n in range(2)]
    with_manifest(tmp_path, paths[0])
    assert [s.sha256 for s in open_shards(paths)] == ["hash of train_0.bin", None]
    other = TokenShardDataset(open_shards(paths), 3, 100).fingerprint()
    shard(tmp_path, range(1, 11), "train_1.bin")
    assert TokenShardDataset(open_shards(paths), 3, 100).fingerprint() != other


HELD_OUT_NAMES = [
    "valid.bin",
    "tiny-val.bin",
    "val-00000.bin",
    "Val_0.bin",
    "val.0.bin",
    "eval.bin",
    "dev.bin",
    "val0.bin",
    "held_out_0.bin",
    "held-out.bin",
    "holdout_000.bin",
    "valset_0.bin",
    "validate_0.bin",
]


@pytest.mark.parametrize("name", HELD_OUT_NAMES)
def test_usual_names_of_validation_shards_are_held_out(tmp_path: Path, name: str) -> None:
    for each in ("train.bin", name):
        (tmp_path / each).touch()
    for path in (str(tmp_path), str(tmp_path / "*.bin")):
        assert [p.name for p in find_shards(path, "train")] == ["train.bin"]
        assert [p.name for p in find_shards(path, "val")] == [name]
        assert passed_over(path) == []


def test_files_of_no_split_are_named(tmp_path: Path) -> None:
    for name in ("train.bin", "test_0.bin", "interval.bin"):
        (tmp_path / name).touch()
    assert [split_of(name) for name in ("tests_0.bin", "testing_0.bin", "trainset.bin")] == ["test", "test", "train"]
    assert [p.name for p in passed_over(str(tmp_path))] == ["interval.bin", "test_0.bin"]
    assert [split_of(name) for name in ("test_train_0.bin", "train_test_0.bin")] == [
        "test",
        "train",
    ]  # the first counts
    pattern = str(tmp_path / "*.bin")
    assert [p.name for p in find_shards(pattern, "train")] == ["interval.bin", "train.bin"]
    assert [p.name for p in passed_over(pattern)] == ["test_0.bin"]


def test_the_folder_tells_where_a_pattern_matches_several(tmp_path: Path) -> None:
    for name in ("train/0.bin", "val/0.bin", "train/1.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*" / "*.bin")
    assert [str(p.relative_to(tmp_path)) for p in find_shards(pattern, "train")] == ["train/0.bin", "train/1.bin"]
    assert [str(p.relative_to(tmp_path)) for p in find_shards(pattern, "val")] == ["val/0.bin"]


def test_tokens_that_no_sequence_holds_are_said_unless_they_are_few(tmp_path: Path) -> None:
    small = [Shard(shard(tmp_path, range(100), f"train_{i}.bin")) for i in range(3)]
    (note,) = TokenShardDataset(small, 64, 1000).describe()
    assert note.startswith("36% of the tokens are not used")
    dataset = TokenShardDataset([Shard(shard(tmp_path, range(6401), "train_9.bin"))], 64, 10_000)
    assert dataset.describe() == []
    dataset.passed_over = [tmp_path / "dev2.bin"]
    assert dataset.describe()[0].endswith("dev2.bin")
