"""manifest.json: what is written is read; what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tinytron.data.manifest import Manifest, ShardFacts, TokenizerFacts, read_manifest, write_manifest
from tinytron.errors import DataError

MANIFEST = Manifest(
    dtype="uint16",
    file_format="timl",
    tokenizer=TokenizerFacts("tokenizer_name", "gpt2", "0" * 64, 50257, 50256, "<|endoftext|>", "prepend"),
    source={"path": "ü.jsonl", "files": [{"path": "/x/ü.jsonl", "bytes": 3, "modified": 4}]},
    options={"val_fraction": 0.1},
    command="python scripts/tokenize_dataset.py",
    documents={"train": 3, "val": 1},
    tokens={"train": 30, "val": 2},
    empty=0,
    complete=True,
    shards=[ShardFacts("train_000000.bin", 30, 3, "1" * 64), ShardFacts("val_000000.bin", 2, 1, "2" * 64)],
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert list(facts)[:4] == ["format", "version", "dtype", "file_format"]
    assert (facts["format"], facts["version"]) == ("tinytron tokens", 1)
    assert facts["tokenizer"]["eot_id"] == 50256
    assert facts["shards"][1] == {"name": "val_000000.bin", "tokens": 2, "documents": 1, "sha256": "2" * 64}
    assert MANIFEST.shards_of("val") == MANIFEST.shards[1:]


def test_a_split_may_have_an_underscore_in_its_name() -> None:
    shards = [ShardFacts(f"{split}_000000.bin", 1, 1, "") for split in ("train", "train_10", "val")]
    manifest = dataclasses.replace(MANIFEST, shards=shards)
    assert [manifest.shards_of(split) for split in ("train", "train_10", "10")] == [shards[:1], shards[1:2], []]


def test_what_a_later_writer_adds_is_no_error(tmp_path: Path) -> None:
    _write(tmp_path, {**dataclasses.asdict(MANIFEST), "colour": "red"})
    assert read_manifest(tmp_path) == MANIFEST


def _write(folder: Path, facts: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r'is not a manifest of token shards \("format": "tinytron tokens"\); remove it'),
        ({"version": 2}, "version 2, but only version 1 is known; update tinytron"),
        ({"shards": None}, r"manifest.json is damaged \(.*\); tokenize again with --overwrite"),
        ({"shards": [{"name": "x"}]}, r"is damaged \('tokens'\)"),
        ({"documents": [1]}, r"is damaged \(documents is list\)"),
        ({"tokenizer": {}}, r"is damaged \('kind'\)"),
        ({"empty": "0"}, r"is damaged \(empty is str\)"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _write(tmp_path, {**dataclasses.asdict(MANIFEST), **change})
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_a_field_that_is_missing_or_no_json(tmp_path: Path) -> None:
    facts = dataclasses.asdict(MANIFEST)
    del facts["dtype"]
    _write(tmp_path, facts)
    with pytest.raises(DataError, match=r"is damaged \('dtype'\)"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "tiny')
    with pytest.raises(
        DataError, match=r"manifest.json cannot be read \(Unterminated string.*--overwrite, or remove it"
    ):
        read_manifest(tmp_path)
