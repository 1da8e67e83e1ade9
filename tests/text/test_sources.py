"""Sources: data sets of the hub in every form, and where text files are cut."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import Naive, make_texts, make_tokenizer, read_texts, tokenize, tokens_of, write_jsonl

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

from tinytron.data.manifest import read_manifest  # noqa: E402
from tinytron.errors import DataError  # noqa: E402
from tinytron.text import parts, sources  # noqa: E402
from tinytron.text.rows import TextRows  # noqa: E402

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
@pytest.mark.sample(5)
def test_data_sets(
    made: Path, tmp_path: Path, path: str, flags: tuple[str, ...], texts: list[str], workers: int, streaming: bool
) -> None:
    more = ("--num_proc", workers, "--streaming", streaming, "--cache_dir", tmp_path / "cache", "--chunksize", 4)
    tokenize(made / path, made / "tokenizer.json", tmp_path / "out", *flags, *more)
    split = flags[-1] if "--dataset_split" in flags else "train"
    assert tokens_of(tmp_path / "out", split) == Naive(made / "tokenizer.json").tokens(texts)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.source["split"] == split
    assert manifest.source["config"] == ("default" if path == "repo" else None)
    assert manifest.source["files"]


@pytest.mark.parametrize("streaming", [True, False])
def test_they_go_on_behind_any_chunk(made: Path, streaming: bool) -> None:
    source = sources.HubSource(str(made / "saved"), None, "train", TextRows(), streaming)
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
            tokenize(*flags, "--dataset_text_key", "body")
        with pytest.raises(DataError, match=f"^{where} train: row 1: 'id' is int, not text"):
            tokenize(*flags, "--dataset_text_key", "id", "--overwrite")
        with pytest.raises(DataError, match=rf"^{where} nothing: .*; check the names and the network, or give a local"):
            tokenize(*flags, "--dataset_split", "nothing", "--overwrite")


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
        "rows": TextRows(),
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
    pieces = list(read_texts([tmp_path / "a.txt"]))
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
    found = list(parts.find_parts(tmp_path / "a.jsonl", parts.Place(), limit, TextRows()))
    assert all(part.documents <= limit for part in found)
    assert sum(part.documents for part in found) == 17
    firsts = [part.part.first for part in found]
    assert firsts == [1 + sum(part.documents for part in found[:n]) for n in range(len(found))]
    later = parts.find_parts(tmp_path / "a.jsonl", found[0].after, limit, TextRows())
    assert [part.part.first for part in later] == firsts[1:]
    texts = [text for part in found for text in parts.read_part(part.part, TextRows())]
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
            assert len(list(read_texts([cut]))) == whole
        else:
            with pytest.raises(DataError, match=f"a.jsonl{suffix}: .*"):
                list(read_texts([cut]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_of_a_packed_file_its_own_bytes_are_counted(tmp_path: Path, suffix: str) -> None:
    import gzip

    raw = write_jsonl(tmp_path / "a.jsonl", make_texts(200)).read_bytes()
    packed = gzip.compress(raw) if suffix == ".gz" else pyarrow.Codec("zstd").compress(raw, asbytes=True)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    source = sources.FileSource([tmp_path / f"a.jsonl{suffix}"])
    done = [chunk.done for chunk in source.chunks(50)]
    assert done == sorted(done)
    assert done[-1] == max(done) == len(packed) < len(raw)


def test_only_the_texts_of_a_row_group_decide_who_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    rows = [{"text": str(number), "text_of_more": f"{number} " * 99} for number in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(parts, "GROUP_BYTES", 1000)
    (found,) = parts.find_parts(tmp_path / "a.parquet", parts.Place(), 7, TextRows())
    assert found.part.data is None
    assert len(list(parts.find_parts(tmp_path / "a.parquet", parts.Place(), 7, TextRows("text_of_more")))) > 1


def test_the_ends_of_texts_are_held_out_where_whole_pieces_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 10)
    options: dict[str, Any] = {"config": None, "split": "train", "rows": TextRows(), "streaming": False}
    for size, expected in ((490, 0.1), (500, 0.0)):
        (tmp_path / "a.txt").write_text("x" * size)
        source = sources.open_source(str(tmp_path / "a.txt"), **options, cache_dir=None, val_fraction=0.1)
        assert isinstance(source, sources.FileSource)
        assert source.held_out_end == expected


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = sources.FileSource([path])
    (chunk,) = source.chunks(100)
    path.write_text("")
    with pytest.raises(DataError, match=r"a.jsonl became shorter while it was being read; do not change it until"):
        list(source.read(chunk))


def test_packed_lines_and_code_are_found(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.json.gz", "c.rs", "d.json", "e.gz", "f.tar"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in sources.find_text_files(str(tmp_path))] == ["a.jsonl.zst", "b.json.gz", "c.rs"]


def _rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Files.


def test_a_folder_gives_its_text_files_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/x.py", "c.PNG", "d.py", "e.jsonl", "f.parquet", "train.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    found = [str(p.relative_to(tmp_path)) for p in sources.find_text_files(str(tmp_path))]
    assert found == ["a/z.md", "b.txt", "d.py", "e.jsonl", "f.parquet"]
    assert sources.find_text_files(str(tmp_path / "*.py")) == [tmp_path / "d.py"]
    assert sources.find_text_files(str(tmp_path / "b.txt")) == [tmp_path / "b.txt"]
    assert sources.find_text_files(str(tmp_path / ".git")) == [tmp_path / ".git" / "x.py"]


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
        sources.find_text_files(str(tmp_path / path))


def test_a_text_file_is_one_document_and_a_long_one_is_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.md").write_text("one\ntwo\nthree\nfour\nfive\nsix")
    (tmp_path / "c.py").write_text("x" * 25)  # no line end to cut at: the memory is bounded all the same
    texts = list(read_texts(sources.find_text_files(str(tmp_path))))
    assert texts == ["0123456789", "one\ntwo\nthree\n", "four\nfive\nsix", "x" * 20, "x" * 5]


def test_rows_of_jsonl_files_empty_lines_and_nulls(tmp_path: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", [{"body": "é", "id": 1}, {"body": None}])
    path.write_text(path.read_text() + "\n  \n" + '{"body": "last"}')
    assert list(read_texts([path], "body")) == ["é", "", "last"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            "a.jsonl, line 2: Expecting value.*; give one JSON object per line, in UTF-8",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n[1]\n',
            "a.jsonl, line 2 is list, not an object with keys; give one object per line",
        ),
        ("a.txt", b"caf\xe9", r"a.txt: .*0xe9.*; convert the file to UTF-8, for example with iconv -f latin1"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' is int, not text; set HF_TEXT_KEY to another key"),
        ("a.jsonl", b'{"id": 1, "body": ""}\n', "a.jsonl, line 1 has no key 'text'; set HF_TEXT_KEY to .*: id, body"),
        ("a.jsonl", b"{}\n", "line 1 has no key 'text'; .*: no keys at all"),
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
        list(read_texts([tmp_path / name], "text", "HF_TEXT_KEY"))
    assert "\n" not in str(caught.value)


def test_a_file_that_goes_away_is_a_data_error(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl"):
        with pytest.raises(DataError, match="No such file"):
            list(read_texts([tmp_path / f"gone{suffix}"]))
