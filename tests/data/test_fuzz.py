"""Damaged token files of every format: what is read is exactly what an independent reader of the same bytes finds, or a
DataError; never another exception, another length or other tokens."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tinytron.data import TokenShardDataset, read_header
from tinytron.data.formats import open_shard, open_weights
from tinytron.data.functions import data_loader, get_num_tokens
from tinytron.data.pack_files import PackFile, make_pack_files
from tinytron.data.samples import SampleOptions
from tinytron.data.shards import Shard
from tinytron.errors import DataError

VOCAB, SEQ_LEN = 300, 3
TIML, LLMC, LLMC_WIDE = 20250805, 20240520, 20240801
TOKENS = [7, 0, 299, 1, 255, 256, 12, 299, 40]


def words(*numbers: int, size: int = 1024) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers).ljust(size, b"\0")


def body(letter: str, values: list[Any]) -> bytes:
    return struct.pack(f"<{len(values)}{letter}", *values)


WHOLE: dict[str, bytes] = {
    "timl uint16": words(TIML, 1, 0, 9) + body("H", TOKENS),
    "timl uint32": words(TIML, 1, 1, 9) + body("I", TOKENS),
    "timl float32": words(TIML, 1, 0, 9) + body("f", TOKENS),
    "llm.c uint16": words(LLMC, 1, 9) + body("H", TOKENS),
    "llm.c uint32": words(LLMC_WIDE, 7, 9) + body("I", TOKENS),
    "llm.c short": words(LLMC, 1, 9, size=12) + body("H", TOKENS),
    "no header": body("H", TOKENS),
    "nothing": b"",
    "timl of no token": words(TIML, 1, 1, 0),
    "llm.c of no token": words(LLMC, 1, 0),
    "llm.c short of no token": words(LLMC, 1, 0, size=12),
}
INTERESTING = [0, 1, 2, 7, 8, 9, 10, -1, -9, -512, 518, 2**31 - 1, -(2**31), TIML, LLMC, LLMC_WIDE, TIML + 1]


def is_text(content: bytes) -> bool:
    """Whether these are 32 bytes or more of printable characters, of which the last may be cut."""
    whole = [content[: len(content) - cut] for cut in range(4)]
    for part in whole:
        with contextlib.suppress(UnicodeDecodeError):
            text = part.decode().removeprefix("\ufeff")
            return len(content) >= 32 and not re.search(
                r"[^\t\r\n -~]", "".join(c for c in text if not c.isprintable())
            )
    return False


def meaning(content: bytes, headerless: str | None = None, weights: bool = False) -> tuple[int, str, list[Any]] | None:
    """Where the values start, the letter of their type and the values; None if the file does not say."""
    size = len(content)
    numbers = struct.unpack(f"<{min(4, size // 4)}i", content[: min(4, size // 4) * 4])
    magic = numbers[0] if numbers else None
    if magic not in (TIML, LLMC, LLMC_WIDE):
        if headerless is None or size % struct.calcsize(headerless) or is_text(content[:1024]):
            return None
        start, letter, count = 0, headerless, size // struct.calcsize(headerless)
    elif (
        not weights
        and size >= 12
        and numbers[:2] == (LLMC, 1)
        and numbers[2] >= 0
        and size == 12 + 2 * numbers[2]
        and (content[12:1024].strip(b"\0") or numbers[2] == 0)
    ):
        start, letter, count = 12, "H", numbers[2]
    elif size < 1024:
        return None
    elif magic == TIML:
        letters = "f" if weights else "HI"
        if numbers[1] != 1 or not 0 <= numbers[2] < len(letters):
            return None
        start, letter, count = 1024, letters[numbers[2]], numbers[3]
    else:
        if numbers[1] != {LLMC: 1, LLMC_WIDE: 7}[magic]:
            return None
        start, letter, count = 1024, "H" if magic == LLMC else "I", numbers[2]
    if weights and magic != TIML:
        return None
    if count < 0 or size != start + count * struct.calcsize(letter):
        return None
    return start, letter, list(struct.unpack_from(f"<{count}{letter}", content, start))


def refusal(action: Callable[[], Any], path: Path) -> str:
    """The text of the DataError that ``action`` raises: one line that begins with the file."""
    text = refusal_in(action)
    assert text.startswith(f"{path}: ")
    return text


def refusal_in(action: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def check(path: Path, content: bytes) -> None:
    """Everything that reads a file, against its meaning."""
    path.write_bytes(content)
    for headerless, dtype in ((None, None), ("H", np.uint16), ("I", np.uint32)):
        found = meaning(content, headerless)
        if found is None:
            refusal(lambda d=dtype: read_header(path, d), path)  # type: ignore[misc]
            refusal(lambda d=dtype: open_shard(path, d), path)  # type: ignore[misc]
            check_dataset(path, content, headerless)
            continue
        start, letter, values = found
        header = read_header(path, dtype)
        assert (header.offset, header.count) == (start, len(values))
        assert header.dtype == np.dtype(f"<u{struct.calcsize(letter)}")
        opened = open_shard(path, dtype)
        assert opened.dtype == header.dtype
        assert opened.tolist() == values
        check_dataset(path, content, headerless)
    weights = meaning(content, weights=True)
    if weights is None:
        refusal(lambda: open_weights(path), path)
    else:
        assert open_weights(path).tobytes() == content[1024:]  # bytes: some are not a number
    check_functions(path, content)


def check_functions(path: Path, content: bytes) -> None:
    found = meaning(content)
    if found is None:
        refusal(lambda: get_num_tokens(str(path)), path)
        return
    values = found[2]
    assert get_num_tokens(str(path)) == len(values)
    if len(values) < SEQ_LEN:
        with pytest.raises(DataError, match=rf"{path.name}, has {len(values)}"):
            data_loader(str(path), 1, SEQ_LEN)
    elif all(token < 2**31 for token in values):
        batches = list(data_loader(str(path), 1, SEQ_LEN))
        assert [t for batch in batches for t in batch["input_ids"].flatten().tolist()] == values[
            : len(batches) * SEQ_LEN
        ]
        assert len(batches) == len(values) // SEQ_LEN


def check_dataset(path: Path, content: bytes, headerless: str | None) -> None:
    dtype = {None: None, "H": "uint16", "I": "uint32"}[headerless]
    found = meaning(content, headerless)
    if found is None:
        refusal(lambda: Shard(path, dtype), path)
        return
    start, letter, values = found
    if len(values) <= SEQ_LEN:
        with pytest.raises(DataError, match=rf"{path.name}: {len(values)} tokens"):
            TokenShardDataset([Shard(path, dtype)], SEQ_LEN, VOCAB)
        return
    dataset = TokenShardDataset([Shard(path, dtype)], SEQ_LEN, VOCAB)
    assert len(dataset) == (len(values) - 1) // SEQ_LEN

    def refused_at(text: str) -> int:
        """The place of the token that an error names, with its number and its byte."""
        token, byte = map(int, re.findall(r"token id (\d+) at byte (\d+)", text)[0])
        assert struct.unpack_from(f"<{letter}", content, byte) == (token,)
        return (byte - start) // struct.calcsize(letter)

    outside = [place for place, token in enumerate(values) if token >= VOCAB]
    if outside:
        assert refused_at(refusal(dataset.check_token_ids, path)) == outside[0]
    else:
        dataset.check_token_ids()
    for number in range(len(dataset)):
        first = number * SEQ_LEN
        row = values[first : first + SEQ_LEN + 1]
        bad = [place for place in outside if first <= place < first + len(row)]
        if bad:
            assert refused_at(refusal(lambda n=number: dataset[n], path)) == bad[0]  # type: ignore[misc]
        else:
            sample = dataset[number]
            assert [*sample["input_ids"].tolist(), int(sample["labels"][-1])] == row
            assert sample["labels"].tolist() == row[1:]


@pytest.mark.parametrize("kind", WHOLE)
def test_every_truncation(tmp_path: Path, kind: str) -> None:
    whole = WHOLE[kind]
    for size in {*range(30), *range(min(1000, len(whole)), len(whole) + 1)}:
        check(tmp_path / "train_0.bin", whole[:size])


@pytest.mark.parametrize("kind", WHOLE)
def test_every_bit_of_the_header(tmp_path: Path, kind: str) -> None:
    whole = WHOLE[kind]
    for bit in range(8 * min(16, len(whole))):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        check(tmp_path / "train_0.bin", bytes(content))


Damage = Callable[[bytearray], None]


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Damage]:
    """A name for the report, and a function that damages a file's bytes."""
    kind = draw(st.sampled_from(["cut", "flip", "word", "insert", "append", "remove", "overwrite"]))
    at = draw(st.one_of(st.integers(0, 16), st.integers(0, 1070)))
    some = draw(st.binary(min_size=1, max_size=9))
    number = draw(st.one_of(st.sampled_from(INTERESTING), st.integers(-(2**31), 2**31 - 1)))

    def damage(content: bytearray) -> None:
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and at < len(content):
            content[at] ^= some[0] or 1
        elif kind == "word":
            word = at % 4 * 4
            content[word : word + 4] = struct.pack("<i", number)
        elif kind == "insert":
            content[at:at] = some
        elif kind == "append":
            content.extend(some * (1 + at // 4))
        elif kind == "remove":
            del content[at : at + len(some)]
        elif kind == "overwrite":
            content[at : at + len(some)] = some

    return f"{kind} at {at}: {some!r}, {number}", damage


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(list(WHOLE)), how=st.lists(damages(), min_size=1, max_size=4))
def test_any_damage(tmp_path: Path, kind: str, how: list[tuple[str, Damage]]) -> None:
    content = bytearray(WHOLE[kind])
    for _, damage in how:
        damage(content)
    check(tmp_path / "train_0.bin", bytes(content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.lists(st.one_of(st.sampled_from(INTERESTING), st.integers(-(2**31), 2**31 - 1)), max_size=4),
    rest=st.one_of(st.binary(max_size=40), st.binary(max_size=60).map(lambda b: bytes(1008) + b)),
)
@example(start=[LLMC, 1, 0], rest=b"")
@example(start=[LLMC, 1, 506], rest=bytes(1012))
@example(start=[LLMC, 1, 2**31 - 1], rest=bytes(1012))
@example(start=[TIML, 1, 1, 2**31 - 1], rest=bytes(1008))
@example(start=[TIML, 1, 1, -256], rest=bytes(1008))
def test_any_garbage(tmp_path: Path, start: list[int], rest: bytes) -> None:
    check(tmp_path / "train_0.bin", words(*start, size=0) + rest)


def test_a_long_header_is_not_taken_for_tokens(tmp_path: Path) -> None:
    """A file of 600 tokens that lost its last 1012 bytes has the length of one with a short header."""
    path = tmp_path / "train_0.bin"
    content = words(LLMC, 1, 600) + body("H", list(range(600)))
    check(path, content)
    assert open_shard(path).tolist() == list(range(600))
    assert len(content[:-1012]) == 12 + 2 * 600
    check(path, content[:-1012])
    assert "declares 600 tokens, so 2224 bytes, but the file has 1212" in refusal(lambda: read_header(path), path)


@pytest.mark.parametrize("damaged", range(3))
def test_one_damaged_file_among_whole_ones_is_the_one_named(tmp_path: Path, damaged: int) -> None:
    kinds = ["timl uint32", "llm.c short", "llm.c uint16"]
    paths = [tmp_path / f"train_{number}.bin" for number in range(3)]
    for path, kind in zip(paths, kinds, strict=True):
        path.write_bytes(WHOLE[kind])
    assert len(TokenShardDataset([Shard(path) for path in paths], SEQ_LEN, VOCAB)) == 3 * 2
    paths[damaged].write_bytes(WHOLE[kinds[damaged]][:-1])
    refusal(lambda: [Shard(path) for path in paths], paths[damaged])
    refusal(lambda: get_num_tokens(str(tmp_path / "*.bin")), paths[damaged])


# The files beside a shard.


STARTS = [0, 2, 3, 8]
BESIDE = {
    ".weights": words(TIML, 1, 0, 9) + body("f", [float(t) for t in TOKENS]),
    ".docs": words(TIML, 1, 1, 4) + body("I", STARTS),
}


def read_beside(path: Path) -> list[dict[str, list[Any]]]:
    """The two samples of the nine tokens, with all that the files beside them say."""
    dataset = TokenShardDataset([Shard(path)], 4, VOCAB, SampleOptions(document_mask=True))
    return [{name: row.tolist() for name, row in dataset[i].items()} for i in range(len(dataset))]


def positions(starts: list[int]) -> list[int]:
    return [place - max([0, *(start for start in starts if start <= place)]) for place in range(8)]


def check_beside(path: Path, suffix: str, content: bytes) -> None:
    """A damaged file of weights or documents beside a whole shard, against its meaning."""
    path.write_bytes(WHOLE["timl uint16"])
    for name, whole in BESIDE.items():
        path.with_suffix(name).write_bytes(content if name == suffix else whole)
    found = meaning(content, weights=suffix == ".weights")
    values = [] if found is None else found[2]
    if suffix == ".weights":  # that of the first token is never used
        sound = len(values) == 9 and all(0 <= value < math.inf for value in values[1:])
    else:
        sound = all(a < b for a, b in itertools.pairwise([*values, len(TOKENS)]))
    if found is None or not sound:
        refusal(lambda: read_beside(path), path.with_suffix(suffix))
        return
    rows = read_beside(path)
    for first, row in zip((0, 4), rows, strict=True):
        assert row["input_ids"] == TOKENS[first : first + 4]
        assert row["labels"] == TOKENS[first + 1 : first + 5]
        weights = values if suffix == ".weights" else TOKENS
        assert body("f", row["weights"]) == body("f", weights[first + 1 : first + 5])
        starts = [max(0, start - first) for start in (values if suffix == ".docs" else STARTS)]
        assert row["positions"] == positions(starts)[:4]


@pytest.mark.parametrize("suffix", BESIDE)
def test_whole_files_beside_a_shard(tmp_path: Path, suffix: str) -> None:
    check_beside(tmp_path / "train_0.bin", suffix, BESIDE[suffix])
    first, second = read_beside(tmp_path / "train_0.bin")
    assert first["positions"] == [0, 1, 0, 0]
    assert second["positions"] == [0, 1, 2, 3]
    assert second["weights"] == TOKENS[5:9]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(list(BESIDE)), how=st.lists(damages(), min_size=1, max_size=3))
def test_any_damage_beside_a_shard(tmp_path: Path, suffix: str, how: list[tuple[str, Damage]]) -> None:
    content = bytearray(BESIDE[suffix])
    for _, damage in how:
        damage(content)
    check_beside(tmp_path / "train_0.bin", suffix, bytes(content))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.integers(0, 10), max_size=9), letter=st.sampled_from("HI"))
def test_any_offsets_of_documents(tmp_path: Path, values: list[int], letter: str) -> None:
    content = words(TIML, 1, "HI".index(letter), len(values)) + body(letter, values)
    check_beside(tmp_path / "train_0.bin", ".docs", content)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(how=st.lists(damages(), min_size=1, max_size=3))
def test_any_damage_to_a_packing(tmp_path: Path, how: list[tuple[str, Damage]]) -> None:
    """It is refused, or it is what it was; and made again where it was refused."""
    path = tmp_path / "train_0.bin"
    path.write_bytes(WHOLE["timl uint16"])
    path.with_suffix(".docs").write_bytes(BESIDE[".docs"])
    packing = path.with_suffix(".pack4")
    packing.unlink(missing_ok=True)
    make_pack_files([Shard(path)], 4)
    whole = packing.read_bytes()
    content = bytearray(whole)
    for _, damage in how:
        damage(content)
    packing.write_bytes(content)
    rows = 0
    if bytes(content[1024:]) == whole[1024:] and meaning(bytes(content)) == meaning(whole):
        rows = PackFile(Shard(path), 4).num_rows
    else:
        refused = refusal_in(lambda: PackFile(Shard(path), 4))
        assert str(packing) in refused
    make_pack_files([Shard(path)], 4)
    assert PackFile(Shard(path), 4).num_rows == 2
    assert rows in (0, 2)
    if not rows:
        assert packing.read_bytes() == whole


@pytest.mark.parametrize("kind", ["timl uint16", "timl uint32", "llm.c uint16", "llm.c uint32", "llm.c short"])
def test_whole_files_are_read_whole(tmp_path: Path, kind: str) -> None:
    """Or everything above could pass by refusing everything."""
    path = tmp_path / "train_0.bin"
    path.write_bytes(WHOLE[kind])
    assert open_shard(path).tolist() == TOKENS
    check(path, WHOLE[kind])
