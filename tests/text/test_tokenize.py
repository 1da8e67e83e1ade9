"""Text to shards: the right tokens, from every kind of input, by any number of workers."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


from tests.helpers.corpus import (  # noqa: E402
    Naive,
    contents,
    make_texts,
    make_tokenizer,
    starts_of,
    tokenize,
    tokens_of,
    write_jsonl,
)
from tinytron.data.formats import open_shard  # noqa: E402
from tinytron.data.manifest import read_manifest  # noqa: E402
from tinytron.errors import ConfigError, DataError  # noqa: E402
from tinytron.text import parts  # noqa: E402
from tinytron.text.chunk_encoder import Encoded  # noqa: E402
from tinytron.text.rates import Rates  # noqa: E402
from tinytron.text.sources import FileSource, file_states  # noqa: E402
from tinytron.text.tokenizers import from_file  # noqa: E402

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder


def test_tokens_documents_and_manifest_are_those_of_a_plain_loop(made: Path, tmp_path: Path) -> None:
    outcome = tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path)
    expected = Naive(made / "tokenizer.json").documents(TEXTS)
    row = [token for ids in expected for token in ids]
    assert tokens_of(tmp_path) == row
    assert starts_of(tmp_path) == np.cumsum([0, *map(len, expected[:-1])]).tolist()
    sizes = [len(open_shard(path)) for path in sorted(tmp_path.glob("train_*.bin"))]
    assert len(sizes) > 3
    assert sizes == [500] * (len(sizes) - 1) + [len(row) % 500]

    manifest = read_manifest(tmp_path)
    assert outcome.manifest == manifest is not None
    assert (manifest.documents, manifest.tokens, manifest.empty) == ({"train": 60}, {"train": len(row)}, 0)
    assert (manifest.dtype, manifest.file_format, manifest.complete) == ("uint16", "timl", True)
    assert [shard.tokens for shard in manifest.shards] == sizes
    assert sum(shard.documents for shard in manifest.shards) == 60
    assert {s.name: s.sha256 for s in manifest.shards}.items() <= contents(tmp_path).items()
    tokenizer = manifest.tokenizer
    assert (tokenizer.kind, tokenizer.eot_token, tokenizer.eot_id) == ("tokenizer_path", "<|endoftext|>", 0)
    assert tokenizer.sha256 == contents(tmp_path)["tokenizer.json"] == contents(made)["tokenizer.json"]
    assert manifest.options == {"num_tokens_per_file": 500, "val_fraction": 0.0}
    ((path, size, time),) = file_states([made / "c.jsonl"])
    assert manifest.source["files"] == [{"path": path, "bytes": size, "modified": time}]
    assert manifest.source["split"] == "train"
    assert not list(tmp_path.glob("*.state"))


def test_the_command_of_the_manifest_makes_the_same_again(made: Path, tmp_path: Path) -> None:
    import shlex

    from tinytron.text.options import parse_options
    from tinytron.text.tokenize import tokenize_dataset

    flags = ("--val_fraction", 0.2, "--eot_position", "append", "--token_dtype", "uint32")
    manifest = tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "a", *flags).manifest
    assert manifest is not None
    words = shlex.split(manifest.command)
    assert words[:2] == ["tinytron", "tokenize"]
    tokenize_dataset(parse_options([*words[2:], "--output_dir", str(tmp_path / "b"), "--num_proc", "0"]))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_bar_stands_where_the_source_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    with Rates(FileSource([tmp_path / "a.txt"]), 10) as rates:
        for done in (10, 30, 100):
            rates.update(done, Encoded({}, np.empty(0, np.int8)))
            assert rates.progress.done == done
    assert rates.summary().startswith("tokenized 90B in ")


@pytest.mark.parametrize("chunksize", [1, 7, 1000])
@pytest.mark.sample(1)
def test_any_number_of_workers_and_any_chunk_size_write_the_same_files(
    made: Path, tmp_path: Path, chunksize: int
) -> None:
    flags = ("--val_fraction", 0.2, "--chunksize", chunksize)
    for count in (0, 1, 2, 3) if chunksize == 7 else (0, 2):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / str(count), *flags, "--num_proc", count)
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "other", *flags[:2], "--chunksize", 11)
    folders = [contents(folder) for folder in tmp_path.iterdir()]
    assert all(folder == folders[0] for folder in folders)
    assert {"train_000001.bin", "train_000001.docs", "val_000000.bin", "manifest.json"} <= set(folders[0])


def _inputs(folder: Path) -> dict[str, Path]:
    """The same texts in every kind of file."""
    (folder / "many").mkdir()
    write_jsonl(folder / "many" / "1.jsonl", TEXTS[:13])
    (folder / "many" / "2.jsonl").write_text("")
    write_jsonl(folder / "many" / "3.jsonl", TEXTS[13:])
    lines = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n" for text in TEXTS)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:].rstrip()))
    codec = pyarrow.Codec("zstd")
    frames = [codec.compress(lines[:1234], asbytes=True), codec.compress(lines[1234:], asbytes=True)]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.Table.from_pylist([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    parquet.write_table(table, folder / "c.parquet", row_group_size=9)
    parquet.write_table(table, folder / "one_group.parquet", compression="zstd")
    (folder / "texts" / "sub").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        name = f"{number:02d}.txt" if number < 30 else f"sub/{number:02d}.rs"
        (folder / "texts" / name).write_text(text)
    return {
        "folder": folder / "many",
        "pattern": folder / "many" / "*.jsonl",
        "gz": folder / "c.jsonl.gz",
        "zst": folder / "c.jsonl.zst",
        "parquet": folder / "c.parquet",
        "one_group": folder / "one_group.parquet",
        "texts": folder / "texts",
    }


def test_every_kind_of_input_gives_the_same_tokens(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Naive(made / "tokenizer.json").tokens(TEXTS)
    for kind, path in _inputs(tmp_path).items():
        for workers in (0, 2):
            out = tmp_path / f"{kind}_{workers}"
            tokenize(path, made / "tokenizer.json", out, "--num_proc", workers)
            assert tokens_of(out) == expected, (kind, workers)
    monkeypatch.setattr(parts, "GROUP_BYTES", 100)  # so that large row groups are read by the main process
    monkeypatch.setattr(parts, "BLOCK_BYTES", 100)
    for kind in ("c.parquet", "one_group.parquet", "c.jsonl.gz", "many"):
        tokenize(tmp_path / kind, made / "tokenizer.json", tmp_path / f"small_{kind}")
        assert tokens_of(tmp_path / f"small_{kind}") == expected, kind


def test_the_end_of_text_token_goes_before_or_behind(made: Path, tmp_path: Path) -> None:
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path, "--eot_position", "append")
    expected = Naive(made / "tokenizer.json", "append").documents(TEXTS)
    assert tokens_of(tmp_path) == [token for ids in expected for token in ids]
    assert starts_of(tmp_path) == np.cumsum([0, *map(len, expected[:-1])]).tolist()


def test_documents_longer_than_shards_run_on_through_them(made: Path, tmp_path: Path) -> None:
    texts = [TEXTS[0], " ".join(TEXTS), TEXTS[3]]
    path = write_jsonl(tmp_path / "long.jsonl", texts)
    tokenize(path, made / "tokenizer.json", tmp_path / "out")
    expected = Naive(made / "tokenizer.json").documents(texts)
    assert len(expected[1]) > 3 * 500
    assert tokens_of(tmp_path / "out") == [token for ids in expected for token in ids]
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert [shard.documents for shard in manifest.shards][:3] == [2, 0, 0]
    assert starts_of(tmp_path / "out") == [0, len(expected[0]), len(expected[0]) + len(expected[1])]


def test_documents_without_text_are_left_out_and_counted(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": ""}\n{"text": "one"}\n{"text": null}\n{"text": "a\\ud800b"}\n')
    manifest = tokenize(path, made / "tokenizer.json", tmp_path / "out").manifest
    assert manifest is not None
    assert (manifest.documents, manifest.empty) == ({"train": 2}, 2)
    assert tokens_of(tmp_path / "out") == Naive(made / "tokenizer.json").tokens(["one", "a?b"])


def test_validation_is_chosen_by_the_text_alone(made: Path, tmp_path: Path) -> None:
    copies = [*TEXTS, *reversed(TEXTS)]
    write_jsonl(tmp_path / "c.jsonl", copies)
    tokenize(tmp_path / "c.jsonl", made / "tokenizer.json", tmp_path / "out", "--val_fraction", 0.2)
    naive = Naive(made / "tokenizer.json")
    train, val = (_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(tuple(ids) for ids in naive.documents(copies))
    assert 0.05 < len(val) / len(copies) < 0.4
    assert [ids for ids in map(tuple, naive.documents(copies)) if ids in set(val)] == val  # in their order


def _documents(folder: Path, split: str) -> list[tuple[int, ...]]:
    row, starts = tokens_of(folder, split), starts_of(folder, split)
    return [tuple(row[a:b]) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_uint32_and_the_format_of_llm_c(made: Path, tmp_path: Path) -> None:
    expected = Naive(made / "tokenizer.json").tokens(TEXTS)
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "wide", "--token_dtype", "uint32")
    assert tokens_of(tmp_path / "wide") == expected
    assert open_shard(tmp_path / "wide" / "train_000000.bin").dtype == np.uint32
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "llmc", "--file_format", "llmc")
    raw = (tmp_path / "llmc" / "train_000001.bin").read_bytes()
    assert np.frombuffer(raw, "<i4", 256).tolist() == [20240520, 1, 500, *[0] * 253]
    assert np.frombuffer(raw, "<u2", offset=1024).tolist() == expected[500:1000]
    assert (tmp_path / "llmc" / "train_000001.docs").exists()


def test_files_are_named_by_the_split_as_given(made: Path, tmp_path: Path) -> None:
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path, "--dataset_split", "validation")
    assert (tmp_path / "validation_000000.bin").exists()


def test_a_finished_folder_is_left_alone(made: Path, tmp_path: Path) -> None:
    flags = (made / "c.jsonl", made / "tokenizer.json", tmp_path)
    assert tokenize(*flags).fresh
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = tokenize(*flags, "--num_proc", 2, "--chunksize", 3)
    assert not again.fresh
    assert again.manifest == read_manifest(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {p.name for p in tmp_path.iterdir()} - {"tokenize.lock"} == set(contents(tmp_path))


def test_overwriting_removes_what_was_there_and_nothing_else(made: Path, tmp_path: Path) -> None:
    flags = (made / "c.jsonl", made / "tokenizer.json", tmp_path)
    tokenize(*flags, "--num_tokens_per_file", 100)
    (tmp_path / "notes.txt").write_text("mine")
    tokenize(*flags, "--overwrite")
    assert tokens_of(tmp_path) == Naive(made / "tokenizer.json").tokens(TEXTS)
    assert (tmp_path / "notes.txt").exists()


def test_the_own_tokenizer_is_trained_once_without_validation_texts(made: Path, tmp_path: Path) -> None:
    import tokenizers

    from tinytron.text.selection import is_held_out
    from tinytron.text.tokenizers import train_bpe

    flags = (made / "c.jsonl", None, tmp_path / "a", "--train_bpe", 300, "--val_fraction", 0.3)
    said: list[str] = []
    tokenize(*flags, say=said.append)
    texts = [text for text in TEXTS if not is_held_out(text.encode(), 0.3)]
    assert f"trained the tokenizer on {sum(len(text.encode()) for text in texts):,} bytes of text" in said
    assert 10 < len(texts) < 55
    trained = train_bpe(texts, 300)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == trained.to_str()
    assert tokens_of(tmp_path / "a") == Naive(tmp_path / "a" / "tokenizer.json").tokens(texts)
    assert not tokenize(*flags).fresh
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json")).get_vocab_size() == 300
    tokenize(*flags[:2], tmp_path / "b", "--train_bpe", 300, "--train_bpe_bytes", 1000)
    assert contents(tmp_path / "a")["tokenizer.json"] != contents(tmp_path / "b")["tokenizer.json"]


def test_a_byte_order_mark_changes_no_token(made: Path, tmp_path: Path) -> None:
    bom, tokenizer = b"\xef\xbb\xbf", made / "tokenizer.json"
    lines = (made / "c.jsonl").read_bytes()
    (tmp_path / "bom.jsonl").write_bytes(bom + lines + bom + lines)
    tokenize(tmp_path / "bom.jsonl", tokenizer, tmp_path / "a")
    assert tokens_of(tmp_path / "a") == 2 * Naive(tokenizer).tokens(TEXTS)
    (tmp_path / "prose.txt").write_bytes(bom + b"the quick fox\n" + bom)
    (tmp_path / "tokenizer.json").write_bytes(bom + tokenizer.read_bytes())
    tokenize(tmp_path / "prose.txt", tmp_path / "tokenizer.json", tmp_path / "b")
    assert tokens_of(tmp_path / "b") == Naive(tokenizer).tokens(["the quick fox\n\ufeff"])


def test_of_a_few_plain_texts_the_ends_are_held_out(made: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = ["".join(f"line {i} of {name}\n" for i in range(200)) for name in ("a", "b")]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    messages: list[str] = []
    flags = ("--val_fraction", 0.1)
    outcome = tokenize(tmp_path / "in", made / "tokenizer.json", tmp_path / "out", *flags, say=messages.append)
    assert any("held out: the last 0.1 of every file" in message for message in messages)
    naive = Naive(made / "tokenizer.json")
    cuts = [text.index("\n", int(len(text) * 0.9)) + 1 for text in texts]
    pairs = list(zip(texts, cuts, strict=True))
    assert tokens_of(tmp_path / "out", "train") == naive.tokens([text[:cut] for text, cut in pairs])
    assert tokens_of(tmp_path / "out", "val") == naive.tokens([text[cut:] for text, cut in pairs])
    assert outcome.manifest is not None
    assert outcome.manifest.documents == {"train": 2, "val": 2}


@pytest.mark.parametrize("text", ["one line only, without an end", "naïve 猫s 🙂 " * 3, "a\nb\n"])
def test_the_end_of_a_short_text_is_held_out_too(made: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    tokenize(tmp_path / "a.txt", made / "tokenizer.json", tmp_path / "out", "--val_fraction", 0.3)
    decoded = [
        from_file(made / "tokenizer.json").decode(tokens_of(tmp_path / "out", split)) for split in ("train", "val")
    ]
    assert "".join(decoded) == text
    assert all(decoded)


def test_a_split_without_a_document_is_an_error_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "few.jsonl", TEXTS[:2])
    with pytest.raises(DataError, match=r"--val_fraction 0\.001: none of 2 documents goes to val.*--val_path FILE"):
        tokenize(tmp_path / "few.jsonl", made / "tokenizer.json", tmp_path / "out", "--val_fraction", 0.001)
    assert not list((tmp_path / "out").glob("*.bin"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_very_many_files_are_told_in_brief_and_a_change_of_one_is_seen(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"text {number}")
    tokenize(texts, made / "tokenizer.json", out)
    monkeypatch.setattr("tinytron.text.sources.MANY_FILES", 7)
    assert not tokenize(texts, made / "tokenizer.json", out).fresh  # a folder that lists them all is the same
    tokenize(texts, made / "tokenizer.json", tmp_path / "brief")
    manifest = read_manifest(tmp_path / "brief")
    assert manifest is not None
    assert (manifest.source["files"]["number"], manifest.source["files"]["bytes"]) == (8, 48)
    os.utime(texts / "3.txt", ns=(0, 5))
    for folder in (out, tmp_path / "brief"):
        with pytest.raises(ConfigError, match="source files that have changed"):
            tokenize(texts, made / "tokenizer.json", folder)
