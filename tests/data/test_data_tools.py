"""``tinytron data``: what a folder holds, and everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import EOT, Naive, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.runs import ROOT
from tinytron.cli.main import main
from tinytron.data.formats import open_shard, write_shard
from tinytron.data.manifest import ShardFacts, read_manifest, write_manifest
from tinytron.utils import progress
from tinytron.utils.training import sha256_of

TEXTS = make_texts(30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "tokenizer.json")
    path = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    tokenize(path, tmp_path / "tokenizer.json", tmp_path / "out", "--val_fraction", 0.2)
    return tmp_path / "out"


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(folder)]) == 0
    manifest = read_manifest(folder)
    assert manifest is not None
    out = capsys.readouterr().out
    size = manifest.tokenizer.vocab_size
    path = folder.parent / "tokenizer.json"
    for line in (
        "format     timl, uint16\n",
        f"tokenizer  --tokenizer_path {path}: {size} ids; {EOT} (0) before every document\n",
        f"source     {folder.parent / 'c.jsonl'}\n",
        f"made by    {manifest.command}\n",
        f"train      {manifest.documents['train']} documents, {manifest.tokens['train']:,} tokens, 2 shards\n",
        f"val        {manifest.documents['val']} documents, {manifest.tokens['val']} tokens, 1 shard\n",
    ):
        assert line in out
    (begins,) = [line.removeprefix("begins     ") for line in out.splitlines() if line.startswith("begins")]
    assert begins.rstrip("'\"")[1:] in (text[:198] for text in TEXTS) or begins[1:-1] in TEXTS


def test_info_of_shards_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", range(5), file_format="llmc")
    assert main(["data", "info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "format     llmc, uint16\nmanifest   none\nfineweb_train 5 tokens, 1 shard\n" in out


def test_what_is_whole_is_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for position, file_format in (("prepend", "timl"), ("append", "llmc")):
        flags = ("--overwrite", "--eot_position", position, "--file_format", file_format, "--val_fraction", 0.2)
        tokenize(folder.parent / "c.jsonl", folder.parent / "tokenizer.json", folder, *flags)
        assert main(["data", "verify", str(folder)]) == 0
        assert capsys.readouterr().out == "ok: 3 shards\n"


def test_long_work_shows_its_progress(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", -1.0)
    assert main(["data", "verify", str(folder)]) == 0
    assert "verifying shards: " in capsys.readouterr().err
    flags = ["--train_chars", "--num_proc", "0", "--chunksize", "1", "--output_dir", str(folder.parent / "chars")]
    assert main(["tokenize", "--dataset_path", str(folder.parent / "c.jsonl"), *flags]) == 0
    said = capsys.readouterr().err
    assert "reading text for the tokenizer: " in said
    assert "tokenizing: " in said
    assert "\ntokenized " in said


def _change(folder: Path, write: Callable[[np.ndarray], np.ndarray], *, told: bool) -> None:  # type: ignore[type-arg]
    path = folder / "train_000000.bin"
    write_shard(path, write(open_shard(path).copy()))
    manifest = read_manifest(folder)
    assert manifest is not None
    if told:
        first = dataclasses.replace(manifest.shards[0], sha256=sha256_of(path))
        write_manifest(folder, dataclasses.replace(manifest, shards=[first, *manifest.shards[1:]]))


def _flip(tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    tokens[5] ^= 1
    return tokens


def _large(tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    tokens[7] = 60000
    return tokens


def _no_end(tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    tokens[0] = 5
    return tokens


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _change(f, _flip, told=False), "train_000000.bin: its sha256 differs from the one in the manifest"),
        (lambda f: _change(f, _large, told=True), "train_000000.bin: token id 60000 is not below the vocabulary of"),
        (lambda f: _change(f, _no_end, told=True), f"train_000000.docs: a document does not begin at {EOT}"),
        (lambda f: _change(f, lambda t: t[:-1], told=True), "train_000000.bin: 499 tokens, but the manifest says 500"),
        (lambda f: (f / "train_000001.bin").unlink(), "train_000001.bin: cannot be read (No such file or directory)"),
        (lambda f: (f / "train_000001.bin").write_bytes(b"x" * 1025), "train_000001.bin: this is text, not tokens"),
        (lambda f: (f / "val_000000.docs").unlink(), "val_000000.docs: cannot be read"),
        (
            lambda f: write_shard(f / "val_000000.docs", [0], np.uint32),
            "val_000000.docs: 1 documents, but the manifest",
        ),
        (lambda f: _starts(f, lambda s: s[::-1]), "train_000000.docs: the document offsets do not ascend, or are"),
        (lambda f: _starts(f, lambda s: [*s[:-1], 500]), "train_000000.docs: the document offsets do not ascend"),
        (lambda f: write_shard(f / "train_000009.bin", [1]), "train_000009.bin: not in the manifest"),
        (lambda f: _edit(f, dtype="uint32"), "timl, uint16, but the manifest says timl, uint32"),
        (
            lambda f: _edit(f, tokens={"train": 1, "val": 2}),
            "token and document counts of train are not the sums",
        ),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: hashes, documents and vocabulary cannot be"),
    ],
)
def test_every_damage_is_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    assert main(["data", "verify", str(folder)]) == 1
    assert message in capsys.readouterr().out


def _edit(folder: Path, **change: object) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    write_manifest(folder, dataclasses.replace(manifest, **change))  # type: ignore[arg-type]


def _starts(folder: Path, change: Callable[[list[int]], list[int]]) -> None:
    path = folder / "train_000000.docs"
    write_shard(path, change(open_shard(path).tolist()), np.uint32)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert "holds no token shards (*.bin); give a folder that tinytron tokenize wrote" in capsys.readouterr().err
    assert main(["data", "inform", str(tmp_path)]) == 2
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_a_program_and_so_is_the_tokenizer_pipeline(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "c.jsonl", TEXTS)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    flags = ("--dataset_path", tmp_path / "c.jsonl", "--tokenizer_path", tmp_path / "tokenizer.json")
    script = ("scripts/tokenize_dataset.py", *flags, "--output_dir", tmp_path / "out")
    done = run(*script)
    assert done.returncode == 0, done.stderr
    count = len(Naive(tmp_path / "tokenizer.json").tokens(TEXTS))
    assert f"train: 30 documents, {count:,} tokens, 1 shard in {tmp_path / 'out'}" in done.stdout
    assert f"train with: python pretrain_debug.py --dataset_path {tmp_path / 'out'} --vocab_size 384" in done.stdout
    assert "tokens/s" in done.stderr
    tokens = run("-m", "tinytron", "tokenize", *flags, "--output_dir", tmp_path / "other").stdout
    assert f"tinytron pretrain --dataset_path {tmp_path / 'other'} " in tokens
    assert run(*script).stdout == f"{tmp_path / 'out'} already has the shards: nothing to do\n"
    done = run(*script, "--token_dtyp", "uint32")
    assert done.returncode == 2
    assert done.stderr.endswith("error: unknown argument --token_dtyp; did you mean --token_dtype?; see --help\n")
    assert "--min_file_index" in run("scripts/tokenize_dataset.py", "--help-all").stdout
    assert run("-m", "tinytron", "data", "verify", tmp_path / "out").stdout == "ok: 1 shard\n"


def test_the_shard_facts_of_a_split(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert all(isinstance(shard, ShardFacts) for shard in manifest.shards)
    assert [s.name for s in manifest.shards_of("val")] == ["val_000000.bin"]
