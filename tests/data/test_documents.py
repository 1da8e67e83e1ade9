"""Documents from files and rows: all of them, in order, and every broken one named."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinytron.data import documents
from tinytron.errors import ConfigError, DataError
from tinytron.text import parts, sources


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Files.


def test_a_folder_gives_its_text_files_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/x.py", "c.PNG", "d.py", "e.jsonl", "f.parquet", "train.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    found = [str(p.relative_to(tmp_path)) for p in documents.find_text_files(str(tmp_path))]
    assert found == ["a/z.md", "b.txt", "d.py", "e.jsonl", "f.parquet"]
    assert documents.find_text_files(str(tmp_path / "*.py")) == [tmp_path / "d.py"]
    assert documents.find_text_files(str(tmp_path / "b.txt")) == [tmp_path / "b.txt"]
    assert documents.find_text_files(str(tmp_path / ".git")) == [tmp_path / ".git" / "x.py"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "--dataset_path .*nowhere: there is no such file or folder"),
        ("*.txt", "there is no such file or folder"),
        (
            "empty",
            r"has no token shards \(train_\*.bin\) and no text; .* that end in .jsonl, .* .parquet, .txt, .md, .py or",
        ),
        ("image.png", "and no text"),
    ],
)
def test_a_path_without_text_is_an_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_text("x")
    with pytest.raises(DataError, match=message):
        documents.find_text_files(str(tmp_path / path))


def test_a_text_file_is_one_document_and_a_long_one_is_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.md").write_text("one\ntwo\nthree\nfour\nfive\nsix")
    (tmp_path / "c.py").write_text("x" * 25)  # no line end to cut at: the memory is bounded all the same
    texts = list(sources.read_texts(documents.find_text_files(str(tmp_path))))
    assert texts == ["0123456789", "one\ntwo\nthree\n", "four\nfive\nsix", "x" * 20, "x" * 5]


def test_rows_of_jsonl_files_empty_lines_and_nulls(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [{"body": "é", "id": 1}, {"body": None}])
    path.write_text(path.read_text() + "\n  \n" + '{"body": "last"}')
    assert list(sources.read_texts([path], "body")) == ["é", "", "last"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: Expecting value"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl, line 2 is list, not an object with keys"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' is int, not text; set HF_TEXT_KEY to another key"),
        ("a.jsonl", b'{"id": 1, "body": ""}\n', "a.jsonl, line 1 has no key 'text'; set HF_TEXT_KEY to .*: id, body"),
        ("a.jsonl", b"{}\n", "line 1 has no key 'text'; .*: no key at all"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: 'utf-8' codec can't decode byte 0xff"),
        ("a.txt", b"abc\xff", "a.txt: 'utf-8' codec can't decode byte 0xff in position 3"),
        ("a.parquet", b"abc", "a.parquet: Parquet file size is 3 bytes"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(sources.read_texts([tmp_path / name], "text", "HF_TEXT_KEY"))
    assert "\n" not in str(caught.value)


def test_a_file_that_goes_away_is_a_data_error(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl"):
        with pytest.raises(DataError, match="No such file"):
            list(sources.read_texts([tmp_path / f"gone{suffix}"]))


# Pipeline.


def test_short_documents_are_left_out_whatever_white_space_is_around_them() -> None:
    texts = ["", "   ", "ab", " ab ", "abc", "abcd "]
    assert list(documents.long_enough(texts, 3)) == ["abc", "abcd "]
    assert list(documents.long_enough(texts, 0)) == ["ab", " ab ", "abc", "abcd "]


def test_no_document_left_is_an_error_that_names_a_minimum_that_works() -> None:
    with pytest.raises(
        DataError, match="none of 2 documents has HF_MIN_CHARS=50 characters; use HF_MIN_CHARS=4 or less"
    ):
        list(documents.long_enough(["ab", "abcd"], 50, "HF_MIN_CHARS="))
    with pytest.raises(DataError, match=r"none of 1 documents .*; all are empty"):
        list(documents.long_enough([" "], 0))
    assert next(documents.long_enough(["abcd"], 4)) == "abcd"  # stopping early is no error


def test_shuffling_keeps_every_text_and_is_decided_by_the_seed() -> None:
    texts = [str(i) for i in range(100)]
    once, again, other = (list(documents.shuffled(iter(texts), 20, seed)) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert sorted(once, key=int) == sorted(other, key=int) == texts
    assert list(documents.shuffled(texts, 1000, 1)) != texts
    for size in (0, 1):
        assert list(documents.shuffled(texts, size, 1)) == texts


def test_the_shuffle_buffer_holds_no_more_than_its_size() -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for i in range(1000):
            taken = i + 1
            yield str(i)

    list(itertools.islice(documents.shuffled(texts(), 7, 1), 3))
    assert taken == 7 + 3


def test_tokens_come_in_order_with_their_end_and_in_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BATCH_CHARS", 10)
    batches = []

    def encode(texts: list[str]) -> list[list[int]]:
        batches.append(len(texts))
        return [[ord(c) for c in text] for text in texts]

    texts = ["abc"] * 7 + ["d" * 30]
    assert list(documents.tokenised(texts, encode, [0])) == [[97, 98, 99, 0]] * 7 + [[100] * 30 + [0]]
    assert batches == [4, 4]
    assert list(documents.tokenised(["a"], encode)) == [[97]]
    assert list(documents.tokenised(["a\ud800b"], encode)) == [[97, ord("?"), 98]]  # half a surrogate pair


# Other people's code.


def test_any_exception_becomes_one_line() -> None:
    with (
        pytest.raises(DataError, match=r"^HF_TOKENIZER=x: first second; check it$"),
        documents.as_data_error("HF_TOKENIZER=x", "check it"),
    ):
        raise RuntimeError("first\n  second.")
    with pytest.raises(DataError, match=r"^x: RuntimeError$"), documents.as_data_error("x"):
        raise RuntimeError
    with pytest.raises(DataError) as caught, documents.as_data_error("x"):
        raise RuntimeError("word " * 1000)
    assert len(str(caught.value)) < 320
    with pytest.raises(ConfigError, match="as it is"), documents.as_data_error("x"):
        raise ConfigError("as it is")


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'the package datasets is needed .*pip install "tinytron\[data\]"'):
        next(documents.stream_rows("x", "parquet"))
