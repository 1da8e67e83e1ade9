"""Token files: bytes written out by hand, and every kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytron.data import Shard, TokenShardDataset, formats, read_header, write_shard
from tinytron.data.formats import ShardHeader, open_shard, open_weights, write_weights
from tinytron.errors import DataError

# Magic 20250805 = 0x013500b5, version 1, dtype id, number of tokens; zeros up to byte 1024; the tokens.
MAGIC = b"\xb5\x00\x35\x01"
GOLDEN_U16 = MAGIC + b"\x01\0\0\0" + b"\0\0\0\0" + b"\x03\0\0\0" + bytes(1008) + b"\x01\0" + b"\x02\x01" + b"\xff\xff"
GOLDEN_U32 = MAGIC + b"\x01\0\0\0" + b"\x01\0\0\0" + b"\x02\0\0\0" + bytes(1008) + b"\x01\0\0\0" + b"\x04\x03\x02\x01"

# 20240520 = 0x0134d888 and 20240801 = 0x0134d9a1; no type id, the count is the third number.
LLMC = b"\x88\xd8\x34\x01" + b"\x01\0\0\0" + b"\x03\0\0\0" + bytes(1012) + b"\x01\0" + b"\x02\x01" + b"\xff\xff"
LLMC_SHORT = LLMC[:12] + LLMC[1024:]
LLAMA = b"\xa1\xd9\x34\x01" + b"\x07\0\0\0" + b"\x02\0\0\0" + bytes(1012) + b"\x01\0\0\0" + b"\x04\x03\x02\x01"
WEIGHTS = MAGIC + b"\x01\0\0\0" + b"\0\0\0\0" + b"\x02\0\0\0" + bytes(1008) + b"\0\0\x80\x3f" + b"\0\0\0\xbf"


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


@pytest.mark.parametrize(
    ("golden", "dtype", "offset", "tokens"),
    [
        (LLMC, "<u2", 1024, [1, 258, 65535]),
        (LLMC_SHORT, "<u2", 12, [1, 258, 65535]),
        (LLAMA, "<u4", 1024, [1, 0x01020304]),
        (LLMC[:12], "<u2", 12, None),  # promises three tokens and has none
        (b"\x88\xd8\x34\x01" + b"\x01\0\0\0" + bytes(4), "<u2", 12, []),
    ],
)
def test_other_headers_are_told_apart_by_their_magic_number(
    tmp_path: Path, golden: bytes, dtype: str, offset: int, tokens: list[int] | None
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(golden)
    if tokens is None:
        with pytest.raises(DataError, match="12 bytes are not a token shard"):
            read_header(path)
        return
    for headerless in (None, np.uint32):  # a type for files without a header does not matter here
        assert read_header(path, headerless) == ShardHeader(np.dtype(dtype), len(tokens), offset, "llmc")
        assert open_shard(path, headerless).tolist() == tokens


def test_a_length_that_fits_both_headers_of_llm_c_is_the_long_one(tmp_path: Path) -> None:
    """506 tokens after 12 bytes are 1024 bytes: a long header of 0 tokens would have its count say 0."""
    path = tmp_path / "a.bin"
    path.write_bytes(LLMC[:8] + struct.pack("<i", 506) + bytes(range(200)) * 5 + bytes(12))
    assert read_header(path) == ShardHeader(np.dtype("<u2"), 506, 12, "llmc")
    path.write_bytes(LLMC[:8] + bytes(1016))
    assert read_header(path) == ShardHeader(np.dtype("<u2"), 0, 1024, "llmc")


@pytest.mark.parametrize(("dtype", "tokens"), [("uint16", [1, 2, 3, 4]), ("uint32", [131073, 262147])])
def test_files_without_a_header_need_their_type(tmp_path: Path, dtype: str, tokens: list[int]) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(b"\x01\0\x02\0\x03\0\x04\0")
    assert open_shard(path, dtype).tolist() == tokens
    with pytest.raises(DataError, match=r"train\.bin: 8 bytes are not a token shard"):
        open_shard(path)
    path.write_bytes(b"\x01\0\x02\0\x03")
    begins = 4
    with pytest.raises(
        DataError, match=rf"5 bytes are not a whole number of {dtype} tokens .*: the one at byte {begins} is cut off"
    ):
        open_shard(path, dtype)
    path.write_bytes(b"")
    assert open_shard(path, dtype).tolist() == []
    with pytest.raises(DataError, match="token dtype int64 is not one of uint16, uint32"):
        open_shard(path, "int64")


def test_the_llmc_format_is_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 258, 65535], file_format="llmc")
    assert (tmp_path / "a.bin").read_bytes() == LLMC
    with pytest.raises(DataError, match=r"b\.bin: the llmc format holds uint16 only, not uint32; use the timl format"):
        write_shard(tmp_path / "b.bin", [1], np.uint32, file_format="llmc")


def test_weights_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "train_0.weights"
    write_weights(path, [1.0, -0.5])
    assert path.read_bytes() == WEIGHTS
    assert open_weights(path).tolist() == [1.0, -0.5]
    path.write_bytes(GOLDEN_U16)
    with pytest.raises(DataError, match="declares 3 weights, so 1036 bytes, but the file has 1030"):
        open_weights(path)
    path.write_bytes(GOLDEN_U32)
    with pytest.raises(DataError, match=r"dtype id 1 at byte 8, but expected 0 \(float32\)$"):
        open_weights(path)
    path.write_bytes(LLMC)
    with pytest.raises(DataError, match="magic number 20240520 at byte 0 stands for tokens, not for float32 values"):
        open_weights(path)


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
    assert formats.MAX_TOKENS == 2**31 - 1
    monkeypatch.setattr(formats, "MAX_TOKENS", 4)
    with pytest.raises(DataError, match=r"a\.bin: 5 tokens exceed the 4 of one shard; write several"):
        write_shard(tmp_path / "a.bin", [0] * 5)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "0 bytes are not a token shard: its header alone has 1024"),
        (GOLDEN_U16[:1023], "1023 bytes are not a token shard: its header alone has 1024"),
        (
            header(magic=7) + bytes(6),
            "magic number 7 at byte 0 is not one of 20250805, 20240520, 20240801: .*--token_dtype",
        ),
        (header(version=2) + bytes(6), "version 2 at byte 4, but only version 1 of 20250805 is known"),
        (LLMC[:4] + b"\x02" + LLMC[5:], "version 2 at byte 4, but only version 1 of 20240520 is known"),
        (LLAMA[:4] + b"\x01" + LLAMA[5:], "version 1 at byte 4, but only version 7 of 20240801 is known"),
        (LLMC[:-1], r"header \(byte 8\) declares 3 tokens, so 1030 bytes, but the file has 1029"),
        (LLMC_SHORT[:-1], "17 bytes are not a token shard: its header alone has 1024"),
        (header(dtype_id=2) + bytes(6), r"dtype id 2 at byte 8, but expected 0 \(uint16\) or 1 \(uint32\)"),
        (header(dtype_id=-1) + bytes(6), r"dtype id -1 at byte 8, but expected 0 \(uint16\) or 1 \(uint32\)"),
        (header(count=-1), r"the header \(byte 12\) declares -1 tokens"),
        (header(count=-512), r"the header \(byte 12\) declares -512 tokens, so 0 bytes"),
        (
            GOLDEN_U16[:-1],
            r"\(byte 12\) declares 3 tokens, so 1030 bytes, but the file has 1029: it is truncated",
        ),
        (
            GOLDEN_U16 + b"\0",
            r"\(byte 12\) declares 3 tokens, so 1030 bytes, but the file has 1031: .* or damaged",
        ),
        (header(dtype_id=1) + bytes(6), r"declares 3 tokens, so 1036 bytes, but the file has 1030: .*; write it again"),
    ],
)
def test_damage_is_named_with_file_and_offset(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "train_0.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: .*{text}"):
        TokenShardDataset([Shard(path)], 1, 2**16)


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
        dataset = TokenShardDataset([Shard(path)], 3, 64)
        dataset.check_token_ids()
        assert all(0 <= t < 64 for row, labels in items(dataset) for t in row + labels)
    except DataError as error:
        assert str(path) in str(error) or path.name in str(error)  # noqa: PT017


def test_ids_of_the_wrong_width_are_refused(tmp_path: Path) -> None:
    """A model trains to a lower loss on them: half of them are 0."""
    rng = np.random.default_rng(0)
    for vocab, wide, narrow in ((448, "<u4", "uint16"), (128_000, "<u4", "uint16"), (50_000, "<u8", "uint32")):
        path = tmp_path / f"{vocab}.bin"
        ids = rng.integers(0, vocab, 4000)
        ids[::100] = 0  # such as ends of text
        path.write_bytes(ids.astype(wide).tobytes())
        with pytest.raises(
            DataError, match=rf"{vocab}\.bin: every second token is \d or less.*(use|write) .*uint.*write_shard"
        ):
            read_header(path, narrow)
    assert open_shard(tmp_path / "448.bin", "uint32").shape == (4000,)
    for ids in (rng.integers(0, 3, 4000), np.zeros(4000), rng.integers(0, 50_000, 4000)):
        path.write_bytes(ids.astype("<u2").tobytes())
        assert read_header(path, "uint16").count == 4000


@pytest.mark.parametrize("headerless", [None, np.uint16])
@pytest.mark.parametrize(
    "text", ["Plain words of a text, and some more.\n" * 3, "\ufeff" + "Deutsche Wörter: größer als 猫 " * 9]
)
def test_a_text_is_not_taken_for_tokens(tmp_path: Path, text: str, headerless: Any) -> None:
    path = tmp_path / "input.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"input\.txt: this is text, not tokens; tokenize it first: tinytron tokenize "):
        read_header(path, headerless)


def test_tokens_are_not_taken_for_a_text(tmp_path: Path) -> None:
    """Also those of characters, whose ids are codes of letters."""
    path = tmp_path / "tokens.bin"
    np.frombuffer(b"Plain words of a text, and some more.", np.uint8).astype("<u2").tofile(path)
    assert read_header(path, np.uint16).count == 37
