"""Sources: data sets of the hub in every form, and where text files are cut."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import Naive, make_texts, make_tokenizer, tokenise, tokens_of, write_jsonl

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

from tinytron.data import documents  # noqa: E402
from tinytron.data.manifest import read_manifest  # noqa: E402
from tinytron.errors import DataError  # noqa: E402
from tinytron.text import parts, sources  # noqa: E402

TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of the hub, and what ``save_to_disk`` writes."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json")
    (folder / "repo" / "data").mkdir(parents=True)
    rows = datasets.Dataset.from_list([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    rows.select(range(30)).to_parquet(str(folder / "repo" / "data" / "train-00000-of-00001.parquet"))
    rows.select(range(30, 40)).to_parquet(str(folder / "repo" / "data" / "validation-00000-of-00001.parquet"))
    (folder / "repo" / "README.md").write_text("not a document")
    rows.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": rows.select(range(5)), "test": rows.select(range(5, 9))}).save_to_disk(
        str(folder / "saved_dict")
    )
    return folder


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("path", "flags", "texts"),
    [
        ("repo", ("--dataset_name", "default"), TEXTS[:30]),
        ("repo", ("--dataset_name", "default", "--dataset_split", "validation"), TEXTS[30:]),
        ("saved", (), TEXTS),
        ("saved_dict", ("--dataset_split", "test"), TEXTS[5:9]),
    ],
)
def test_data_sets(
    made: Path, tmp_path: Path, path: str, flags: tuple[str, ...], texts: list[str], workers: int, streaming: bool
) -> None:
    more = ("--num_proc", workers, "--streaming", streaming, "--cache_dir", tmp_path / "cache", "--chunksize", 4)
    tokenise(made / path, made / "tokenizer.json", tmp_path / "out", *flags, *more)
    split = flags[-1] if "--dataset_split" in flags else "train"
    assert tokens_of(tmp_path / "out", split) == Naive(made / "tokenizer.json").tokens(texts)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.source["split"] == split
    assert manifest.source["config"] == ("default" if path == "repo" else None)
    assert manifest.source["files"]


@pytest.mark.parametrize("streaming", [True, False])
def test_they_go_on_behind_any_chunk(made: Path, streaming: bool) -> None:
    source = sources.HubSource(str(made / "saved"), None, "train", "text", "--dataset_text_key", streaming)
    chunks = list(source.chunks(7))
    assert [chunk.done for chunk in chunks] == [7, 14, 21, 28, 35, 40]
    assert source.size() == (None if streaming else 40, "row")
    for number, chunk in enumerate(chunks):
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.read(chunk)) == TEXTS[7 * number : 7 * number + 7]
        rest = [text for later in source.chunks(9, chunk.after) for text in source.read(later)]
        assert rest == TEXTS[7 * number + 7 :]


def test_what_is_wrong_with_them(made: Path, tmp_path: Path) -> None:
    where = f"--dataset_path {made / 'repo'} --dataset_name default --dataset_split"
    for streaming in (True, False):
        flags: tuple[Any, ...] = (made / "repo", made / "tokenizer.json", tmp_path / str(streaming))
        flags += ("--dataset_name", "default", "--streaming", streaming, "--cache_dir", tmp_path / "cache")
        with pytest.raises(
            DataError, match=f"^{where} train: row 1 has no key 'body'; set --dataset_text_key to .*text"
        ):
            tokenise(*flags, "--dataset_text_key", "body")
        with pytest.raises(DataError, match=f"^{where} train: row 1: 'id' is int, not text"):
            tokenise(*flags, "--dataset_text_key", "id", "--overwrite")
        with pytest.raises(DataError, match=rf"^{where} nothing: .*; check the names and the network, or give a local"):
            tokenise(*flags, "--dataset_split", "nothing", "--overwrite")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("HuggingFaceFW/fineweb-edu", sources.HubSource),
        ("imdb", sources.HubSource),
        ("owner/name-1.5", sources.HubSource),
        ("gone.jsonl", None),
        ("./gone", None),
        ("/gone", None),
        ("a/b/c", None),
        ("gone/*", None),
    ],
)
def test_a_name_on_the_hub_is_told_from_a_path(path: str, kind: type | None) -> None:
    options: dict[str, Any] = {
        "config": None,
        "split": "train",
        "text_key": "text",
        "streaming": True,
        "cache_dir": None,
    }
    if kind is None:
        with pytest.raises(DataError, match="there is no such file or folder"):
            sources.open_source(path, **options)
    else:
        assert isinstance(sources.open_source(path, **options), kind)


# Parts of files.


def test_long_texts_are_cut_at_line_ends_and_never_in_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PIECE_BYTES", 10)
    text = "🙂" * 20 + "\nab\r\n" + "é" * 31 + "\n\n" + "x" * 9
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(sources.read_texts([tmp_path / "a.txt"]))
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert len(pieces) > 5
    assert all(piece for piece in pieces)


@pytest.mark.parametrize("limit", [1, 3, 4, 1000])
@pytest.mark.parametrize("block", [1, 30, 2**20])
def test_lines_are_numbered_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, block: int
) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", block)
    lines = [json.dumps({"text": f"line {i}"}) if i % 5 else "" for i in range(1, 18)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = list(parts.find_parts(tmp_path / "a.jsonl", parts.Place(), limit, "text", ""))
    assert all(part.documents <= limit for part in found)
    assert sum(part.documents for part in found) == 17
    firsts = [part.part.first for part in found]
    assert firsts == [1 + sum(part.documents for part in found[:n]) for n in range(len(found))]
    later = parts.find_parts(tmp_path / "a.jsonl", found[0].after, limit, "text", "")
    assert [part.part.first for part in later] == firsts[1:]
    texts = [text for part in found for text in parts.read_part(part.part, "text", "")]
    assert texts == [f"line {i}" for i in range(1, 18) if i % 5]


def test_a_row_group_that_was_begun_is_gone_on_with_whatever_its_size(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": text} for text in TEXTS])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    source = sources.FileSource([tmp_path / "a.parquet"])
    texts = [text for chunk in source.chunks(7, parts.Place(0, 0, 5)) for text in source.read(chunk)]
    assert texts == TEXTS[5:]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_was_cut_off_is_no_shorter_corpus(tmp_path: Path, suffix: str) -> None:
    import gzip

    path = write_jsonl(tmp_path / "a.jsonl", make_texts(2000))
    raw = path.read_bytes()
    packed = gzip.compress(raw) if suffix == ".gz" else pyarrow.Codec("zstd").compress(raw, asbytes=True)
    cut = tmp_path / f"a.jsonl{suffix}"
    for content, whole in ((packed, 2000), (packed * 2, 4000), (packed[:-100], 0), (packed + packed[:-100], 0)):
        cut.write_bytes(content)
        if whole:
            assert len(list(sources.read_texts([cut]))) == whole
        else:
            with pytest.raises(DataError, match=f"a.jsonl{suffix}: .*"):
                list(sources.read_texts([cut]))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = sources.FileSource([path])
    (chunk,) = source.chunks(100)
    path.write_text("")
    with pytest.raises(DataError, match=r"a.jsonl has become shorter while it was read; leave it alone until"):
        list(source.read(chunk))


def test_packed_lines_and_code_are_found(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.json.gz", "c.rs", "d.json", "e.gz", "f.tar"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in documents.find_text_files(str(tmp_path))] == ["a.jsonl.zst", "b.json.gz", "c.rs"]
