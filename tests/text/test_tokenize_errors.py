"""Every mistake of a user of the pipeline is one line, and leaves nothing that looks finished."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from tests.helpers.corpus import contents, make_texts, make_tokenizer, options, tokenize, workers, write_jsonl  # noqa: E402
from tinytron.data.formats import write_shard  # noqa: E402
from tinytron.errors import ConfigError, DataError  # noqa: E402
from tinytron.text import token_writer  # noqa: E402
from tinytron.text.options import parse_options  # noqa: E402
from tinytron.text.tokenize import LOCK, tokenize_dataset  # noqa: E402
from tinytron.utils.lock import wait_for_lock  # noqa: E402

TEXTS = make_texts(30)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json")
    make_tokenizer(folder / "endless.json", ())
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder


# Options.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--dataset_path is missing; .*file or folder.*hub"),
        (
            "--dataset_path x",
            ".*tokenizer given; .*--tokenizer_name, --encoding_name, --tokenizer_path, --train_bpe",
        ),
        ("--dataset_path x --train_bpe 300 --encoding_name gpt2", "--encoding_name and --train_bpe .*; give"),
        ("--dataset_pat x", "unknown argument --dataset_pat; did you mean --dataset_path?"),
        (
            "--num_tokens_per_file 0",
            "--num_tokens_per_file 0 .*1..2147483647; use --num_tokens_per_file 2\\*\\*27",
        ),
        ("--num_tokens_per_file 2**31", "--num_tokens_per_file 2147483648 must be in"),
        (
            "--num_tokens_per_file 2**x",
            "argument --num_tokens_per_file: '2\\*\\*x' is not a whole number like 1000000, 1e6",
        ),
        ("--chunksize 0", "--chunksize 0 must be in"),
        ("--num_proc -1", "--num_proc -1 must be in 0..4096; use --num_proc 1"),
        ("--min_file_index 3 --max_file_index 2", "--min_file_index 3 must be in 0..2; use --min_file_index 0"),
        ("--max_file_index -1", "--max_file_index -1 must be in 0..999999"),
        ("--train_bpe 256", "--train_bpe 256 must be in 257.."),
        ("--train_bpe_bytes 0", "--train_bpe_bytes 0 must be in 1.."),
        ("--min_chars -1", "--min_chars -1 must be in 0..2147483648; use --min_chars 50"),
        ("--max_samples 0", "--max_samples 0 must be in 1.."),
        ("--max_tokens 0", "--max_tokens 0 must be in 1.."),
        ("--max_tokens 9 --val_path a.txt", "--max_tokens cannot be combined with --val_path"),
        ("--shuffle_buffer -1", "--shuffle_buffer -1 must be in 0..2147483648; use --shuffle_buffer 10000"),
        ("--val_fraction 0.6", "--val_fraction 0.6 must be in 0..0.5; use --val_fraction 0.01"),
        ("--val_fraction 0.1 --dataset_split val", "--val_fraction makes val_.*, and so does --dataset_split val"),
        (
            "--token_dtype uint32 --file_format llmc",
            "--file_format llmc .*--token_dtype uint32; use --file_format timl",
        ),
        ("--token_dtype uint8", "argument --token_dtype: invalid choice: 'uint8'"),
        ("--streaming maybe", "argument --streaming does not accept maybe; use --streaming true or --streaming false"),
        ("--no-streaming true", "argument --no-streaming does not accept true"),
    ],
)
def test_options_that_break_a_rule(flags: str, message: str) -> None:
    if flags.startswith(("--num", "--chunk", "--m", "--tr", "--val", "--tok", "--file", "--str", "--no", "--shuf")):
        given = "" if "--train_bpe 256" in flags else "--train_bpe 300 "
        flags = f"--dataset_path x {given}{flags}"
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_options(flags.split())


def test_spellings_of_options() -> None:
    base = ["--dataset_path", "a/My-Data.jsonl.gz", "--encoding_name", "gpt2"]
    plain = parse_options(base)
    assert (plain.num_tokens_per_file, plain.token_dtype, plain.chunksize, plain.streaming) == (
        2**27,
        "uint16",
        4096,
        False,
    )
    assert (plain.dataset_split, plain.dataset_text_key, plain.min_file_index) == ("train", "text", 0)
    assert plain.workers >= 1
    assert plain.folder == Path("data/My-Data")
    assert parse_options([*base, "--dataset_name", "x"]).folder == Path("data/My-Data_x")
    for words, value in ((["--streaming"], True), (["--streaming", "true"], True), (["--streaming", "False"], False)):
        assert parse_options([*base, *words]).streaming is value
    assert parse_options([*base, "--streaming", "--no-streaming"]).streaming is False
    assert parse_options([*base, "--num_tokens_per_file", "2**20"]).num_tokens_per_file == 2**20
    assert parse_options([*base, "--dataset_split", "train[:10%]"]).split == "train_10"


@pytest.mark.parametrize(("cores", "workers_"), [(1, 1), (2, 1), (8, 7)])
def test_one_core_is_left_to_the_main_process(cores: int, workers_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert parse_options(["--dataset_path", "a.jsonl", "--encoding_name", "gpt2"]).workers == workers_


# The tokenizer.


def test_a_vocabulary_that_does_not_fit(made: Path, tmp_path: Path) -> None:
    large = json.loads((made / "tokenizer.json").read_text())
    large["added_tokens"].append({**large["added_tokens"][0], "id": 400, "content": "<more>"})
    vocabulary = large["model"]["vocab"]
    vocabulary |= {f"<{i}>": i for i in range(401, 2**16 + 1)}
    (tmp_path / "large.json").write_text(json.dumps(large))
    message = r"--tokenizer_path .*large.json .*65536.* --token_dtype uint16 .*65535; use --token_dtype uint32"
    with pytest.raises(ConfigError, match=message):
        tokenize(made / "c.jsonl", tmp_path / "large.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tokenize(made / "c.jsonl", tmp_path / "large.json", tmp_path / "out", "--token_dtype", "uint32")


def test_an_end_of_text_token_that_there_is_not(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--eot_token <eot> .*tokenizer.json; use --eot_token .*<\|endoftext"):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "out", "--eot_token", "<eot>")
    with pytest.raises(ConfigError, match="no end-of-text token is known in"):
        tokenize(made / "c.jsonl", made / "endless.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The source.


@pytest.mark.parametrize("num_proc", [0, 2])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n' * 50 + b'{"text": \n', r"a.jsonl, line 51: Expecting value"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"id": 1}\n',
            "a.jsonl, line 3 .*'text'; set --dataset_text_key to .*: id",
        ),
        (
            "a.jsonl",
            b'{"text": 3}\n',
            "a.jsonl, line 1: 'text' .*int.*; set --dataset_text_key .*another key",
        ),
        ("a.txt", b"abc\xff", "a.txt: 'utf-8' codec can't decode byte 0xff in position 3"),
        ("a.jsonl.gz", b"nothing", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.zst", b"nothing", "a.jsonl.zst: ZSTD decompress"),
        ("a.parquet", b"nothing", "a.parquet: Parquet "),
        ("a.jsonl", b'{"text": ""}\n', "--dataset_path .* has no document with text; use another"),
    ],
)
def test_a_broken_source_is_one_error(
    made: Path, tmp_path: Path, name: str, content: bytes, message: str, num_proc: int
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        tokenize(tmp_path / name, made / "tokenizer.json", tmp_path / "out", "--num_proc", num_proc)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not workers()


def test_rows_of_parquet_files_are_named(made: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: row 1 .*'text'; set --dataset_text_key to .*: body"):
        tokenize(tmp_path / "a.parquet", made / "tokenizer.json", tmp_path / "out")
    parquet.write_table(pyarrow.Table.from_pylist([{"body": 1}] * 5), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r"a.parquet: row 1: 'body' is int, not text"):
        tokenize(
            tmp_path / "a.parquet",
            made / "tokenizer.json",
            tmp_path / "out",
            "--dataset_text_key",
            "body",
            "--overwrite",
        )


def test_a_source_that_there_is_not(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--dataset_path .*/gone: there is no such file or folder"):
        tokenize(tmp_path / "gone", made / "tokenizer.json", tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"--dataset_name x is for datasets on the hub, but --dataset_path .* is local"
    ):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "out", "--dataset_name", "x")


def test_a_killed_worker_is_one_error_and_the_next_call_goes_on(made: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", make_texts(2000, longest=300))
    size = ("--num_tokens_per_file", 2**14, "--chunksize", 50)
    flags = (path, made / "tokenizer.json", tmp_path / "out", *size, "--num_proc", 2)

    def kill() -> None:
        while not list((tmp_path / "out").glob("*.bin")):
            time.sleep(0.01)
        os.kill(workers()[0].pid or 0, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DataError, match=r"worker process \d+ was killed \(exit code -9\)"):
        tokenize(*flags)
    thread.join()
    tokenize(*flags, say=lambda _: None)
    tokenize(*flags[:2], tmp_path / "whole", *size)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# The output folder.


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--token_dtype", "uint32"), "--token_dtype uint32, where the folder has uint16"),
        (("--num_tokens_per_file", 200), "--num_tokens_per_file 200, where the folder has 300"),
        (("--eot_position", "append"), "--eot_position append, where the folder has prepend"),
        (("--val_fraction", 0.1), "--val_fraction 0.1, where the folder has 0.0"),
        (("--dataset_split", "test"), "--dataset_split test, where the folder has train"),
        (("--dataset_text_key", "id"), "--dataset_text_key id, where the folder has text"),
        (("--file_format", "llmc"), "--file_format llmc, where the folder has timl"),
        ("source", "source files that have changed"),
        ("tokenizer", "a tokenizer that has changed"),
        ("bpe", "--train_bpe 300, where the folder has --tokenizer_path"),
    ],
)
def test_other_options_are_refused(made: Path, tmp_path: Path, flags: Any, message: str, finished: bool) -> None:
    source, tokenizer, out = tmp_path / "c.jsonl", tmp_path / "tokenizer.json", tmp_path / "out"
    write_jsonl(source, TEXTS)
    tokenizer.write_bytes((made / "tokenizer.json").read_bytes())
    base = (source, tokenizer, out, "--num_tokens_per_file", 300)
    tokenize(*base, *(() if finished else ("--max_file_index", 0)))
    before = contents(out)
    given: list[Any] = [*base]
    if flags == "source":
        write_jsonl(source, TEXTS[:-1])
    elif flags == "tokenizer":
        tokenizer.write_text(tokenizer.read_text() + "\n")
    elif flags == "bpe":
        given = [source, None, *base[2:], "--train_bpe", 300]
    else:
        given += flags
    with pytest.raises(
        ConfigError, match=f"was made with other options: .*{message}.*; use another folder, or --overwrite"
    ):
        tokenize(*given)
    assert contents(out) == before
    tokenize(*given, "--overwrite") if flags != ("--dataset_text_key", "id") else None


def test_shards_of_others_are_not_touched(made: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "train_000000.bin", [1, 2])
    with pytest.raises(DataError, match=r"--output_dir .* shards from elsewhere; .*another folder, or --overwrite"):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path)
    assert {"train_000000.bin"} == set(contents(tmp_path))
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path, "--overwrite")


def test_a_damaged_state_or_a_shard_that_is_gone(made: Path, tmp_path: Path) -> None:
    flags = (made / "c.jsonl", made / "tokenizer.json", tmp_path, "--num_tokens_per_file", 300)
    tokenize(*flags, "--max_file_index", 1)
    state = tmp_path / "tokenize.state"
    whole = state.read_bytes()
    for damaged in (whole[:-1], b"{}\n", b"\xff"):
        state.write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokenize.state is damaged \(.*\); start again with --overwrite"):
            tokenize(*flags)
    state.write_bytes(whole)
    (tmp_path / "train_000001.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train_000001.bin is missing; tokenize again with --overwrite"):
        tokenize(*flags, say=lambda _: None)
    (tmp_path / "elsewhere").rename(tmp_path / "train_000001.bin")
    tokenize(*flags, say=lambda _: None)
    (tmp_path / "train_000001.bin").unlink()
    with pytest.raises(DataError, match=r"train_000001.bin is missing; tokenize again with --overwrite"):
        tokenize(*flags)


def test_a_folder_that_cannot_be_written(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--output_dir .*file/out cannot be written \(Not a directory\); use a disk"):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "file" / "out")


def test_a_full_disk_is_one_error_and_the_next_call_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (made / "c.jsonl", made / "tokenizer.json", tmp_path / "out", "--num_tokens_per_file", 300)
    write, count = token_writer.write_shard, 0

    def full(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:  # a shard is two files
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    monkeypatch.setattr(token_writer, "write_shard", full)
    with pytest.raises(
        DataError, match=r"cannot be written \(No space left on device\).*The same call continues from here"
    ):
        tokenize(*flags)
    tokenize(*flags, say=lambda _: None)
    tokenize(*flags[:2], tmp_path / "whole", *flags[3:])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_at_once_take_turns(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def run() -> None:
        fresh = tokenize_dataset(options(made / "c.jsonl", made / "tokenizer.json", out)).fresh
        (tmp_path / f"{os.getpid()}.{fresh}").touch()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run) for _ in range(2)]
    with wait_for_lock(out / LOCK, print):
        for process in processes:
            process.start()
        time.sleep(0.3)
        assert not list(out.glob("*.bin"))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.suffix for path in tmp_path.glob("*.*")) == [".False", ".True"]
    assert f"waiting for another process that is preparing {out}" in capfd.readouterr().err


def test_a_file_system_without_locks_is_a_data_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(DataError, match="No locks available"):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "out")
