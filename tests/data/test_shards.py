"""Token files: bytes written out by hand, every kind of damage, and what a sample is."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytron.data import TokenShardDataset, find_shards, read_header, write_shard
from tinytron.data import shards as shards_module
from tinytron.data.shards import open_shard
from tinytron.errors import DataError

# Magic 20250805 = 0x013500b5, version 1, dtype id, number of tokens; zeros up to byte 1024; the tokens.
MAGIC = b"\xb5\x00\x35\x01"
GOLDEN_U16 = MAGIC + b"\x01\0\0\0" + b"\0\0\0\0" + b"\x03\0\0\0" + bytes(1008) + b"\x01\0" + b"\x02\x01" + b"\xff\xff"
GOLDEN_U32 = MAGIC + b"\x01\0\0\0" + b"\x01\0\0\0" + b"\x02\0\0\0" + bytes(1008) + b"\x01\0\0\0" + b"\x04\x03\x02\x01"


def header(magic: int = 20250805, version: int = 1, dtype_id: int = 0, count: int = 3) -> bytes:
    return struct.pack("<4i", magic, version, dtype_id, count) + bytes(1008)


def shard(folder: Path, tokens: Any, name: str = "train_0.bin", dtype: Any = np.uint16) -> Path:
    write_shard(folder / name, tokens, dtype)
    return folder / name


def items(dataset: TokenShardDataset) -> list[tuple[list[int], list[int]]]:
    samples = [dataset[i] for i in range(len(dataset))]
    return [(s["input_ids"].tolist(), s["labels"].tolist()) for s in samples]


# The file.


@pytest.mark.parametrize(
    ("golden", "dtype", "tokens"),
    [(GOLDEN_U16, np.uint16, [1, 258, 65535]), (GOLDEN_U32, np.uint32, [1, 0x01020304])],
)
def test_golden_bytes_are_written_and_read(tmp_path: Path, golden: bytes, dtype: Any, tokens: list[int]) -> None:
    path = shard(tmp_path, tokens, dtype=dtype)
    assert path.read_bytes() == golden
    other = tmp_path / "given.bin"
    other.write_bytes(golden)
    found = read_header(other)
    assert (found.dtype, found.count) == (np.dtype(dtype), len(tokens))
    assert open_shard(other).tolist() == tokens


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wide=st.booleans(), data=st.data())
def test_any_tokens_come_back(tmp_path: Path, wide: bool, data: st.DataObject) -> None:
    dtype = np.uint32 if wide else np.uint16
    tokens = data.draw(st.lists(st.integers(0, np.iinfo(dtype).max), max_size=50))
    path = shard(tmp_path, tokens, dtype=dtype)
    assert open_shard(path).tolist() == tokens
    assert path.stat().st_size == 1024 + len(tokens) * (4 if wide else 2)


def test_tokens_are_mapped_not_loaded_and_cannot_be_written(tmp_path: Path) -> None:
    tokens = open_shard(shard(tmp_path, [1, 2, 3]))
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 7


@pytest.mark.parametrize(
    ("tokens", "dtype", "text"),
    [
        ([65536], np.uint16, "token ids 65536..65536 do not fit uint16; use uint32"),
        ([-1, 5], np.uint32, "token ids -1..5 do not fit uint32"),
        ([1.5], np.uint16, r"a\.bin: token ids must be integers, not float64"),
        ([True], np.uint16, r"a\.bin: token ids must be integers, not bool"),
        ([1], np.int64, "token dtype int64 is not one of uint16, uint32"),
        ([1], np.float32, "token dtype float32 is not one of uint16, uint32"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, tokens: list[Any], dtype: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        write_shard(tmp_path / "a.bin", tokens, dtype)
    assert not list(tmp_path.iterdir())


def test_more_tokens_than_the_header_can_count_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shards_module.MAX_TOKENS == 2**31 - 1
    monkeypatch.setattr(shards_module, "MAX_TOKENS", 4)
    with pytest.raises(DataError, match=r"a\.bin: 5 tokens exceed the 4 of one shard; write several"):
        write_shard(tmp_path / "a.bin", [0] * 5)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "0 bytes are no token shard: its header alone has 1024"),
        (GOLDEN_U16[:1023], "1023 bytes are no token shard: its header alone has 1024"),
        (
            header(magic=20240520) + bytes(6),
            "magic number 20240520 at byte 0, expected 20250805: not a timl v1",
        ),
        (header(version=2) + bytes(6), "version 2 at byte 4, only version 1 is known"),
        (header(dtype_id=2) + bytes(6), r"dtype id 2 at byte 8, expected 0 \(uint16\) or 1 \(uint32\)"),
        (header(dtype_id=-1) + bytes(6), r"dtype id -1 at byte 8, expected 0 \(uint16\) or 1 \(uint32\)"),
        (header(count=-1), r"the header \(byte 12\) promises -1 tokens"),
        (header(count=-512), r"the header \(byte 12\) promises -512 tokens, so 0 bytes"),
        (
            GOLDEN_U16[:-1],
            r"\(byte 12\) promises 3 tokens, so 1030 bytes, but the file has 1029: it is truncated",
        ),
        (
            GOLDEN_U16 + b"\0",
            r"\(byte 12\) promises 3 tokens, so 1030 bytes, but the file has 1031: .* or damaged",
        ),
        (header(dtype_id=1) + bytes(6), r"promises 3 tokens, so 1036 bytes, but the file has 1030: .*; write it again"),
    ],
)
def test_damage_is_named_with_file_and_offset(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "train_0.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: .*{text}"):
        TokenShardDataset([path], 1, 2**16)


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"{tmp_path}/none\.bin: cannot be read \(No such file.*\); check --dataset_path"
    ):
        read_header(tmp_path / "none.bin")
    with pytest.raises(DataError, match=rf"{tmp_path}: cannot be read \(Is a directory\); check --dataset_path"):
        read_header(tmp_path)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wide=st.booleans(),
    cut=st.integers(0, 1040),
    flips=st.lists(st.tuples(st.one_of(st.integers(0, 15), st.integers(0, 1039)), st.integers(1, 255)), max_size=4),
    tail=st.binary(max_size=5),
)
def test_damaged_files_give_a_data_error_or_data(
    tmp_path: Path, wide: bool, cut: int, flips: list[tuple[int, int]], tail: bytes
) -> None:
    path = shard(tmp_path, range(8), dtype=np.uint32 if wide else np.uint16)
    content = bytearray(path.read_bytes()[:cut] + tail)
    for at, mask in flips:
        if at < len(content):
            content[at] ^= mask
    path.write_bytes(bytes(content))
    try:
        dataset = TokenShardDataset([path], 3, 64)
        dataset.check_token_ids()
        assert all(0 <= t < 64 for row, labels in items(dataset) for t in row + labels)
    except DataError as error:
        assert str(path) in str(error) or path.name in str(error)  # noqa: PT017


# Samples.


@pytest.mark.parametrize("seq_len", [1, 2, 3, 4, 5, 9])
def test_neighbours_share_one_token_and_the_remainder_is_dropped(tmp_path: Path, seq_len: int) -> None:
    tokens = list(range(100, 110))
    dataset = TokenShardDataset([shard(tmp_path, tokens)], seq_len, 1000)
    found = items(dataset)
    assert len(found) == 9 // seq_len
    for i, (inputs, labels) in enumerate(found):
        assert inputs == tokens[i * seq_len : (i + 1) * seq_len]
        assert labels == tokens[i * seq_len + 1 : (i + 1) * seq_len + 1]
    targets = [t for _, labels in found for t in labels]
    assert targets == tokens[1 : 1 + len(targets)]  # every token but the first is a target once
    assert 0 <= 9 - len(targets) < seq_len


def test_samples_are_int64(tmp_path: Path) -> None:
    sample = TokenShardDataset([shard(tmp_path, range(5))], 2, 10)[0]
    assert {t.dtype for t in sample.values()} == {torch.int64}


def test_no_sample_crosses_shards(tmp_path: Path) -> None:
    """Shards of 7, 1, 0, 5 and 4 tokens: some have a remainder, some no sample at all."""
    sizes = [7, 1, 0, 5, 4]
    paths = [shard(tmp_path, np.arange(n) + 10 * i, f"train_{i}.bin") for i, n in enumerate(sizes)]
    dataset = TokenShardDataset(paths, 3, 100)
    expected = [[0, 1, 2], [3, 4, 5], [30, 31, 32], [40, 41, 42]]
    assert items(dataset) == [(row, [t + 1 for t in row]) for row in expected]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_shards_of_both_dtypes_mix(tmp_path: Path) -> None:
    paths = [shard(tmp_path, [1, 2, 3], "train_0.bin"), shard(tmp_path, [4, 70000, 6], "train_1.bin", np.uint32)]
    assert items(TokenShardDataset(paths, 2, 70001)) == [([1, 2], [2, 3]), ([4, 70000], [70000, 6])]


def test_too_few_tokens_for_one_sample(tmp_path: Path) -> None:
    paths = [shard(tmp_path, range(3), "train_0.bin"), shard(tmp_path, [], "train_1.bin")]
    text = (
        r"no shard holds one sample of --seq_len 3 \+ 1 tokens \(train_0\.bin: 3, train_1\.bin: 0 tokens\); "
        "use a shorter --seq_len"
    )
    with pytest.raises(DataError, match=text):
        TokenShardDataset(paths, 3, 10)
    assert len(TokenShardDataset(paths, 2, 10)) == 1


# Token ids outside the vocabulary.


@pytest.mark.parametrize(("dtype", "width"), [(np.uint16, 2), (np.uint32, 4)])
@pytest.mark.parametrize("at", [0, 4, 6, 10])
def test_an_id_outside_the_vocabulary_is_named_with_its_byte(tmp_path: Path, at: int, dtype: Any, width: int) -> None:
    tokens = np.arange(11)
    tokens[at] = 500
    good, bad = shard(tmp_path, range(5), "train_0.bin"), shard(tmp_path, tokens, "train_1.bin", dtype)
    dataset = TokenShardDataset([good, bad], 2, 500)
    text = rf"{bad}: token id 500 at byte {1024 + width * at} is not below --vocab_size 500; use the vocabulary size"
    with pytest.raises(DataError, match=text):
        dataset.check_token_ids()
    with pytest.raises(DataError, match=text):
        items(dataset)
    items(TokenShardDataset([good, bad], 2, 501))
    TokenShardDataset([good, bad], 2, 501).check_token_ids()


def test_each_part_checks_its_own_shards(tmp_path: Path) -> None:
    paths = [shard(tmp_path, [1, 500 if i == 4 else 1], f"train_{i}.bin") for i in range(6)]
    dataset = TokenShardDataset(paths, 1, 500)
    for part in (0, 2):
        dataset.check_token_ids(part=part, parts=3)
    with pytest.raises(DataError, match=r"train_4\.bin: token id 500 at byte 1026"):
        dataset.check_token_ids(part=1, parts=3)


def test_the_check_of_a_long_shard_is_spread_over_it(tmp_path: Path) -> None:
    block = 2**20
    tokens = np.zeros(4 * block, np.uint16)
    tokens[-1] = 500
    dataset = TokenShardDataset([shard(tmp_path, tokens)], 8, 500)
    with pytest.raises(DataError, match=f"at byte {1024 + 2 * (4 * block - 1)}"):
        dataset.check_token_ids()
    dataset.check_token_ids(limit=2 * block)  # blocks 0 and 2 of 4
    tokens[2 * block] = 600
    dataset = TokenShardDataset([shard(tmp_path, tokens)], 8, 500)
    with pytest.raises(DataError, match=f"token id 600 at byte {1024 + 2 * 2 * block}"):
        dataset.check_token_ids(limit=2 * block)


# Finding shards.


def test_a_folder_gives_its_splits_in_order(tmp_path: Path) -> None:
    for name in ("train_000010.bin", "train_000002.bin", "val_000000.bin", "test_0.bin", "train_0.txt", "train.bin"):
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(str(tmp_path), "train")] == ["train_000002.bin", "train_000010.bin"]
    assert [p.name for p in find_shards(str(tmp_path), "val")] == ["val_000000.bin"]


def test_a_pattern_or_a_file_is_training_data(tmp_path: Path) -> None:
    for name in ("b.bin", "a.bin", "c.txt"):
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*.bin")
    assert [p.name for p in find_shards(pattern, "train")] == ["a.bin", "b.bin"]
    assert find_shards(pattern, "val") == []
    assert find_shards(str(tmp_path / "c.txt"), "train") == [tmp_path / "c.txt"]


def test_a_pattern_may_match_both_splits(tmp_path: Path) -> None:
    for name in ("val_000001.bin", "fineweb_val.bin", "train_000001.bin", "val_000000.bin", "train_000000.bin"):
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*.bin")
    assert [p.name for p in find_shards(pattern, "val")] == ["val_000000.bin", "val_000001.bin"]
    train = ["fineweb_val.bin", "train_000000.bin", "train_000001.bin"]  # only a name that begins with val_ is held out
    assert [p.name for p in find_shards(pattern, "train")] == train
    assert find_shards(str(tmp_path / "train_*.bin"), "val") == []
    with pytest.raises(DataError, match=r"val_\*\.bin is no folder and matches no file"):
        find_shards(str(tmp_path / "val_*.bin"), "train")


def test_a_folder_without_validation_data_is_fine_but_not_without_training_data(tmp_path: Path) -> None:
    (tmp_path / "val_0.bin").touch()
    with pytest.raises(DataError, match=rf"--dataset_path {tmp_path} has no train_\*\.bin; name a folder"):
        find_shards(str(tmp_path), "train")
    (tmp_path / "val_0.bin").rename(tmp_path / "train_0.bin")
    assert find_shards(str(tmp_path), "val") == []


def test_a_path_that_matches_nothing(tmp_path: Path) -> None:
    text = rf"--dataset_path {tmp_path}/none is no folder and matches no file; give a folder with train_\*\.bin"
    with pytest.raises(DataError, match=text):
        find_shards(f"{tmp_path}/none", "train")


# Identity.


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    def fingerprint(tokens: Any, folder: str = "a", seq_len: int = 2, dtype: Any = np.uint16) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return TokenShardDataset([shard(tmp_path / folder, tokens, dtype=dtype)], seq_len, 2**16).fingerprint()

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
