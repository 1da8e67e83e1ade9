"""Which documents are tokenized, in which order, and where they go."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import (
    Naive,
    contents,
    make_texts,
    make_tokenizer,
    starts_of,
    tokenize,
    tokens_of,
    write_jsonl,
)
from tinytron.data.manifest import read_manifest
from tinytron.errors import ConfigError, DataError
from tinytron.text import chunk_encoder
from tinytron.text.chunk_encoder import ChunkEncoder
from tinytron.text.encoders import PlainEncoder
from tinytron.text.selection import DocumentRule, SelectedSource, is_held_out, shuffled
from tinytron.text.sources import FileSource
from tinytron.utils.signals import StopRequest

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder


def _documents(folder: Path, split: str = "train") -> list[list[int]]:
    row, starts = tokens_of(folder, split), starts_of(folder, split)
    return [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


# Short documents.


def test_short_documents_are_left_out_whatever_white_space_is_around_them() -> None:
    texts = ["", "   ", "ab", " ab ", "abc", "abcd "]
    assert [text for text in texts if DocumentRule("train", min_chars=3).is_kept(text)] == ["abc", "abcd "]
    assert [text for text in texts if DocumentRule("train", min_chars=1).is_kept(text)] == texts[2:]
    assert [text for text in texts if DocumentRule("train").is_kept(text)] == texts[1:]


@pytest.mark.parametrize("selected", [False, True])
def test_short_documents_are_counted_and_decide_nothing_else(made: Path, tmp_path: Path, selected: bool) -> None:
    long = [text for text in TEXTS if len(text) >= 100]
    assert 10 < len(long) < 50
    more = ("--max_samples", 1000) if selected else ()
    for workers in (0, 2):
        out = tmp_path / str(workers)
        flags = ("--min_chars", 100, "--num_proc", workers, "--val_fraction", 0.2, *more)
        manifest = tokenize(made / "c.jsonl", made / "tokenizer.json", out, *flags).manifest
        assert manifest is not None
        assert (sum(manifest.documents.values()), manifest.empty) == (len(long), 60 - len(long))
        assert manifest.options["min_chars"] == 100
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    naive = Naive(made / "tokenizer.json").documents(long)
    assert sorted(_documents(tmp_path / "0") + _documents(tmp_path / "0", "val")) == sorted(naive)


def test_no_document_left_is_an_error_that_names_a_minimum_that_works(made: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", " abcd "])
    with pytest.raises(
        DataError, match=r"none of 2 documents has --min_chars 50 characters; use --min_chars 4 or less"
    ):
        tokenize(path, made / "tokenizer.json", tmp_path / "out", "--min_chars", 50)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tokenize.lock"}
    tokenize(path, made / "tokenizer.json", tmp_path / "out", "--min_chars", 4)
    write_jsonl(path, [" "])
    with pytest.raises(DataError, match="has no document with text; use another"):
        tokenize(path, made / "tokenizer.json", tmp_path / "blank", "--min_chars", 1)


def test_the_tokenizer_is_trained_without_short_documents(made: Path, tmp_path: Path) -> None:
    from tinytron.text.tokenizers import train_bpe

    tokenize(made / "c.jsonl", None, tmp_path, "--train_bpe", 300, "--min_chars", 100)
    expected = train_bpe([text for text in TEXTS if len(text) >= 100], 300)
    assert (tmp_path / "tokenizer.json").read_text() == expected.to_str()


def test_the_documents_held_out_are_the_same_in_every_version() -> None:
    """The first 16 hexadecimal digits of the text's SHA-256, as a part of the largest such number."""
    texts = [text.encode() for text in TEXTS]
    parts = [int(hashlib.sha256(text).hexdigest()[:16], 16) / 2**64 for text in texts]
    for fraction in (0.0, 0.1, 0.5):
        assert [is_held_out(text, fraction) for text in texts] == [part < fraction for part in parts]
    assert 0 < sum(is_held_out(text, 0.1) for text in texts) < 20


# A number of documents, and their order.


def test_the_first_documents_are_taken_that_are_long_enough(made: Path, tmp_path: Path) -> None:
    long = [text for text in TEXTS if len(text) >= 100]
    for name, flags, texts in (
        ("7", ("--max_samples", 7), TEXTS[:7]),
        ("long", ("--max_samples", 7, "--min_chars", 100), long[:7]),
        ("all", ("--max_samples", 1000), TEXTS),
    ):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / name, *flags)
        assert tokens_of(tmp_path / name) == Naive(made / "tokenizer.json").tokens(texts)


@pytest.mark.parametrize("position", ["prepend", "none"])
@pytest.mark.sample(1)
def test_tokens_are_counted_up_to_the_document_that_reaches_the_number(
    made: Path, tmp_path: Path, position: str
) -> None:
    """In both splits together, whatever the chunks and the workers; documents after it are not counted as left out."""
    texts = [*TEXTS[:20], "", *TEXTS[20:]]
    write_jsonl(tmp_path / "c.jsonl", texts)
    documents = Naive(made / "tokenizer.json", position).documents(texts)
    ends = list(itertools.accumulate(map(len, documents)))
    flags = ("--eot_position", position, "--val_fraction", 0.2)
    for number, count in ((ends[24], 25), (ends[24] + 1, 26), (1, 1), (10**9, 60)):
        found = []
        for name, more in (("a", ()), ("b", ("--chunksize", 1)), ("c", ("--chunksize", 1000, "--num_proc", 2))):
            out = tmp_path / f"{number}{name}"
            limited = ("--max_tokens", number, *(flags if count > 1 else flags[:2]))
            manifest = tokenize(tmp_path / "c.jsonl", made / "tokenizer.json", out, *limited, *more).manifest
            assert manifest is not None
            assert manifest.complete
            assert manifest.options["max_tokens"] == number
            assert (sum(manifest.documents.values()), manifest.empty) == (count, int(count > 20))
            assert sum(manifest.tokens.values()) == ends[count - 1]
            found.append(contents(out))
        assert found[0] == found[1] == found[2]
        both = _documents(out) + (_documents(out, "val") if count > 1 else [])
        assert sorted(both) == sorted(documents[:count])


def test_shuffling_keeps_every_text_and_is_decided_by_the_seed(made: Path, tmp_path: Path) -> None:
    texts = [str(i) for i in range(100)]
    once, again, other = (list(shuffled(iter(texts), 20, seed)) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert sorted(once, key=int) == sorted(other, key=int) == texts
    assert list(shuffled(texts, 1000, 1)) != texts
    for size in (0, 1):
        assert list(shuffled(texts, size, 1)) == texts
    flags = ("--shuffle_buffer", 20, "--seed", 3)
    for name, more in (("a", ()), ("b", ("--chunksize", 3, "--num_proc", 2))):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / name, *flags, *more)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert tokens_of(tmp_path / "a") == Naive(made / "tokenizer.json").tokens(list(shuffled(TEXTS, 20, 3)))


def test_the_shuffle_buffer_holds_no_more_than_its_size() -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for i in range(1000):
            taken = i + 1
            yield str(i)

    list(itertools.islice(shuffled(texts(), 7, 1), 3))
    assert taken == 7 + 3


def test_a_selection_continues_after_any_chunk(made: Path) -> None:
    rule = DocumentRule("train", min_chars=80)
    source = SelectedSource(FileSource([made / "c.jsonl"]), rule, 30, 11, 5)
    chunks = list(source.chunks(7))
    texts = [text for chunk in chunks for text in source.read(chunk)]
    assert sum(map(rule.is_kept, texts)) == 30
    for number, chunk in enumerate(chunks):
        rest = [text for later in source.chunks(9, chunk.after) for text in source.read(later)]
        assert rest == [text for mine in chunks[number + 1 :] for text in source.read(mine)]


def test_an_interrupted_selection_ends_in_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--shuffle_buffer", 9, "--max_samples", 40, "--min_chars", 50, "--num_tokens_per_file", 300)
    args = (made / "c.jsonl", made / "tokenizer.json")
    tokenize(*args, tmp_path / "whole", *flags)
    encode, stop = ChunkEncoder.__call__, StopRequest()

    def stopping(self: ChunkEncoder, chunk: Any) -> Any:
        if chunk.done > 20:
            stop.take(15)
        return encode(self, chunk)

    monkeypatch.setattr(ChunkEncoder, "__call__", stopping)
    assert tokenize(*args, tmp_path / "out", *flags, stop=stop, say=lambda _: None).received == 15
    tokenize(*args, tmp_path / "out", *flags, say=lambda _: None)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_options_are_part_of_what_a_folder_is_made_from(made: Path, tmp_path: Path) -> None:
    args = (made / "c.jsonl", made / "tokenizer.json", tmp_path)
    command = tokenize(*args, "--max_samples", 9, "--seed", 1).manifest
    assert command is not None
    assert "--max_samples 9" in command.command
    for flags, message in (
        (("--max_samples", 8), "--max_samples 8, where the folder has 9"),
        ((), "--max_samples None, where the folder has 9"),
        (("--max_samples", 9, "--min_chars", 2), "--min_chars 2, where the folder has None"),
        (("--max_samples", 9, "--shuffle_buffer", 2), "--shuffle_buffer 2, where the folder has None"),
        (("--max_samples", 9, "--split_name", "val"), "--split_name val, where the folder has None"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize(*args, *flags)
    assert not tokenize(*args, "--max_samples", 9, "--seed", 2).fresh  # nothing was shuffled by it


def test_the_seed_of_a_shuffle_and_the_text_for_a_tokenizer_are_part_of_it_too(made: Path, tmp_path: Path) -> None:
    args = (made / "c.jsonl", made / "tokenizer.json", tmp_path / "shuffled", "--shuffle_buffer", 5, "--seed")
    tokenize(*args, 1)
    with pytest.raises(ConfigError, match="--seed 2, where the folder has 1"):
        tokenize(*args, 2)
    args = (made / "c.jsonl", None, tmp_path / "trained", "--train_bpe", 300, "--train_bpe_bytes")
    tokenize(*args, 1000)
    with pytest.raises(ConfigError, match="--train_bpe_bytes 2000, where the folder has 1000"):
        tokenize(*args, 2000)


# Validation from files of its own, and the names of files.


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", None])
def test_validation_text_of_its_own(made: Path, tmp_path: Path, tokenizer: str | None) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:50])
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.txt").write_text(TEXTS[50])
    write_jsonl(tmp_path / "val" / "b.jsonl", TEXTS[51:])
    path = made / tokenizer if tokenizer else None
    flags = ("--val_path", tmp_path / "val", *(() if tokenizer else ("--train_bpe", 300)))
    for workers in (0, 2):
        out = tmp_path / str(workers)
        tokenize(tmp_path / "train.jsonl", path, out, *flags, "--chunksize", 9, "--num_proc", workers)
    out = tmp_path / "0"
    assert contents(out) == contents(tmp_path / "2")
    naive = Naive(out / "tokenizer.json")
    assert tokens_of(out) == naive.tokens(TEXTS[:50])
    assert tokens_of(out, "val") == naive.tokens(TEXTS[50:])
    if tokenizer is None:
        from tinytron.text.tokenizers import train_bpe

        assert (out / "tokenizer.json").read_text() == train_bpe(TEXTS[:50], 300).to_str()
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.source["val_path"] == str(tmp_path / "val")
    assert len(manifest.source["files"]) == 3
    write_jsonl(tmp_path / "val" / "b.jsonl", TEXTS[52:])
    with pytest.raises(ConfigError, match="source files that have changed"):
        tokenize(tmp_path / "train.jsonl", path, out, *flags)


def test_validation_text_continues_where_it_was(made: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "val.jsonl", TEXTS[:30])
    args = (made / "c.jsonl", made / "tokenizer.json")
    flags = ("--val_path", tmp_path / "val.jsonl", "--num_tokens_per_file", 300, "--chunksize", 4)
    tokenize(*args, tmp_path / "whole", *flags)
    for last in range(4):
        tokenize(*args, tmp_path / "out", *flags, "--max_file_index", last, say=lambda _: None)
    tokenize(*args, tmp_path / "out", *flags, say=lambda _: None)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_validation_text_that_cannot_be_used(made: Path, tmp_path: Path) -> None:
    args = (made / "c.jsonl", made / "tokenizer.json", tmp_path)
    with pytest.raises(DataError, match=r"--val_path nowhere: there is no such file or folder"):
        tokenize(*args, "--val_path", "nowhere")
    for flags, message in (
        (("--val_fraction", 0.1), "--val_fraction .*val_.* --val_path; leave one out"),
        (("--dataset_split", "val"), "--val_path .*val_.* --dataset_split val; leave one out"),
        (("--max_samples", 3), "--max_samples .*--val_path; use --val_fraction"),
        (("--shuffle_buffer", 3), "--shuffle_buffer .*--val_path"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize(*args, "--val_path", made / "c.jsonl", *flags)

    with pytest.raises(ConfigError, match=r"--val_path x .*local files; .*hub use --val_fraction"):
        tokenize("owner/name", *args[1:], "--val_path", "x")


def test_the_files_can_be_named_for_another_split(made: Path, tmp_path: Path) -> None:
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path, "--dataset_split", "test", "--split_name", "train")
    assert tokens_of(tmp_path, "train") == Naive(made / "tokenizer.json").tokens(TEXTS)


# Without a token between documents.


def test_no_token_between_documents(made: Path, tmp_path: Path) -> None:
    from tinytron.data import inspect
    from tinytron.data.shards import find_shards, open_shards
    from tinytron.text.run_tokenizer import find_tokenizer

    texts = [*TEXTS[:5], "", *TEXTS[5:]]
    write_jsonl(tmp_path / "c.jsonl", texts)
    out = tmp_path / "out"
    tokenize(tmp_path / "c.jsonl", made / "tokenizer.json", out, "--eot_position", "none")
    assert _documents(out) == Naive(made / "tokenizer.json", "none").documents(TEXTS)
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest.tokenizer.eot_id, manifest.tokenizer.eot_token) == (None, None)
    assert list(inspect.problems(out)) == []
    assert any("no token between documents" in line for line in inspect.describe(out))
    found = find_tokenizer(str(out))
    assert (found.end, found.prepend) == (None, False)
    shards = open_shards(find_shards(str(out), "train"))
    assert shards[0].starts_between(0, 500).tolist() == [start for start in starts_of(out) if start < 500]
    with pytest.raises(ConfigError, match="--eot_token <eot> needs --eot_position prepend or append, not none"):
        tokenize(made / "c.jsonl", made / "tokenizer.json", out, "--eot_position", "none", "--eot_token", "<eot>")


def test_a_tokenizer_without_an_end_of_text_token_names_the_way_out(made: Path, tmp_path: Path) -> None:
    endless = make_tokenizer(tmp_path / "endless.json", ())
    with pytest.raises(ConfigError, match=r"no end-of-text token is known in .*endless.json; use --eot_position none"):
        tokenize(made / "c.jsonl", endless, tmp_path / "out")
    tokenize(made / "c.jsonl", endless, tmp_path / "out", "--eot_position", "none")


# Batches.


def test_texts_are_encoded_in_batches_of_bounded_size(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from tinytron.text.sources import Chunk, Part, Place

    monkeypatch.setattr(chunk_encoder, "BATCH_CHARS", 10)
    batches = []

    def encode(texts: list[str]) -> list[list[int]]:
        batches.append(len(texts))
        return [[ord(c) for c in text] for text in texts]

    texts = ["abc"] * 7 + ["d" * 30, "", "a\ud800b"]  # half a surrogate pair
    work = ChunkEncoder(FileSource([]), PlainEncoder(encode, 0, "append", np.dtype("<u2")), DocumentRule("train"))
    made_of = work(Chunk([Part("", data=texts)], Place(), 0))
    tokens, lengths, *_ = made_of.splits["train"][0]
    expected = [[97, 98, 99, 0]] * 7 + [[100] * 30 + [0], [97, ord("?"), 98, 0]]
    assert tokens.tolist() == [token for document in expected for token in document]
    assert lengths.tolist() == [len(document) for document in expected]
    assert (batches, made_of.empty) == ([4, 4, 1], 1)


def test_an_empty_file_among_others_has_nothing_to_hold_out(made: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one line of text\n" * 50)
    (tmp_path / "texts" / "b.txt").touch()
    tokenize(tmp_path / "texts", made / "tokenizer.json", tmp_path / "out", "--val_fraction", 0.1)
    assert len(tokens_of(tmp_path / "out")) > len(tokens_of(tmp_path / "out", "val")) > 5


def test_names_that_are_not_utf_8(made: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    folder.mkdir()
    (folder / os.fsdecode(b"x\xfe.txt")).write_text("one line of text\n" * 5)
    tokenize(folder, made / "tokenizer.json", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.source["path"] == str(folder)
    assert not tokenize(folder, made / "tokenizer.json", tmp_path / "out").fresh


def test_a_split_without_a_document_names_its_files(made: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "short.jsonl", ["a", "b c"])
    args = (made / "tokenizer.json", tmp_path / "out", "--min_chars", 10)
    with pytest.raises(
        DataError, match=r"--val_path .*short\.jsonl has no document to keep for val; use another, or a sm"
    ):
        tokenize(made / "c.jsonl", *args, "--val_path", tmp_path / "short.jsonl")
    with pytest.raises(
        DataError, match=r"--dataset_path .*short\.jsonl has no document to keep for train; use another"
    ):
        tokenize(tmp_path / "short.jsonl", *args, "--val_path", made / "c.jsonl")
