"""Interrupted tokenizations: killed at any moment, stopped by a signal, or by --max_file_index, they continue, and end in
the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

from tests.helpers.corpus import contents, make_texts, make_tokenizer, tokenize, tokens_of, write_jsonl
from tests.helpers.runs import ROOT
from tinytron.data.manifest import read_manifest
from tinytron.errors import ConfigError, DataError
from tinytron.text import parts, sources
from tinytron.text.chunk_encoder import ChunkEncoder
from tinytron.text.rows import TextRows
from tinytron.text.state import read_state
from tinytron.utils import training
from tinytron.utils.signals import StopRequest

TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder


def _in_a_process(action: Callable[[], object]) -> int:
    """Run ``action`` in a fork of this process; returns how that ended, as ``os.waitstatus_to_exitcode`` tells."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            action()
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _dying_at(number: int, before: bool) -> Callable[[Any, Any], None]:
    """``os.replace``, but the process is killed before or after its ``number``-th call."""
    calls = 0
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        nonlocal calls
        if calls == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1

    return dying


FLAGS = ("--val_fraction", 0.2, "--num_tokens_per_file", 300, "--chunksize", 3)


LIMITED = ("tokenizer.json", True, ("--max_tokens", 1000))


@pytest.mark.parametrize(
    ("tokenizer", "before", "more"),
    [("tokenizer.json", True, ()), ("tokenizer.json", False, ()), (None, True, ()), LIMITED],
)
@pytest.mark.sample(1)
def test_killed_at_every_write_it_goes_on_to_the_same_bytes(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: str | None,
    before: bool,
    more: tuple[object, ...],
) -> None:
    flags = (*FLAGS, *more) if tokenizer else (*FLAGS, "--train_bpe", 300)
    path = made / tokenizer if tokenizer else None
    tokenize(made / "c.jsonl", path, tmp_path / "whole", *flags)
    expected, deaths = contents(tmp_path / "whole"), 0
    while True:  # each time from the start, to the next write
        out = tmp_path / str(deaths)
        with monkeypatch.context() as patch:
            patch.setattr(training.os, "replace", _dying_at(deaths, before))
            status = _in_a_process(lambda out=out: tokenize(made / "c.jsonl", path, out, *flags))  # type: ignore[misc]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        tokenize(made / "c.jsonl", path, out, *flags, say=lambda _: None)
        assert contents(out) == expected, deaths
        deaths += 1
    assert deaths >= 12


def test_what_is_in_shards_is_not_tokenized_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counting(self: ChunkEncoder, chunk: Any) -> Any:
        read.append(chunk.parts[0].start)
        return encode(self, chunk)

    encode = ChunkEncoder.__call__
    monkeypatch.setattr(ChunkEncoder, "__call__", counting)
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "whole", *FLAGS)
    whole = read.copy()
    assert len(whole) == len(set(whole)) == 14

    class Died(BaseException):
        pass

    def failing(*args: Any) -> Any:
        if len(read) == 20:  # six chunks have gone through
            raise Died
        return counting(*args)

    monkeypatch.setattr(ChunkEncoder, "__call__", failing)
    read[:] = [-1] * 14
    with pytest.raises(Died):
        tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "out", *FLAGS)
    monkeypatch.setattr(ChunkEncoder, "__call__", counting)
    first = len(read)
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "out", *FLAGS, say=lambda _: None)
    again = read[first:]
    assert again == whole[-len(again) :]
    assert 8 <= len(again) < 12  # only the chunks behind the last finished shard
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_asked_to_stop_it_keeps_what_it_has(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(made / "c.jsonl", made / "tokenizer.json", tmp_path / "whole", *FLAGS)
    encode, number = ChunkEncoder.__call__, 0

    def stopping(self: ChunkEncoder, chunk: Any) -> Any:
        nonlocal number
        number += 1
        if number % 2 == 0:
            stop.take(signal.SIGTERM)
        return encode(self, chunk)

    monkeypatch.setattr(ChunkEncoder, "__call__", stopping)
    ends = []
    for _ in range(8):
        stop = StopRequest()
        flags = (made / "c.jsonl", made / "tokenizer.json", tmp_path / "out", *FLAGS)
        ends.append(tokenize(*flags, stop=stop, say=lambda _: None))
        if ends[-1].manifest is not None:
            break
        assert ends[-1].received == signal.SIGTERM
    assert number == 14  # every chunk once: the state is taken down when it stops
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _inputs(folder: Path) -> list[Path]:
    import gzip

    import pyarrow
    import pyarrow.parquet

    write_jsonl(folder / "plain.jsonl", TEXTS)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "plain.jsonl").read_bytes()))
    table = pyarrow.Table.from_pylist([{"text": text} for text in TEXTS])
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=13)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("\n".join(TEXTS))
    (folder / "texts" / "b.txt").write_text("🙂" * 100)
    return [folder / name for name in ("plain.jsonl", "packed.jsonl.gz", "rows.parquet", "texts")]


def test_every_source_goes_on_behind_any_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PIECE_BYTES", 150)
    for group_bytes in (parts.GROUP_BYTES, 10):
        monkeypatch.setattr(parts, "GROUP_BYTES", group_bytes)
        folder = tmp_path / str(group_bytes)
        folder.mkdir()
        for path in _inputs(folder):
            source = sources.open_source(
                str(path), config=None, split="train", rows=TextRows(), streaming=False, cache_dir=None
            )
            chunks = list(source.chunks(4))
            texts = [list(source.read(chunk)) for chunk in chunks]
            assert len(chunks) > 3, path
            assert [chunk.done for chunk in chunks] == sorted(chunk.done for chunk in chunks)
            assert chunks[-1].done == source.size()[0]
            for number, chunk in enumerate(chunks):
                rest = [text for later in source.chunks(5, chunk.after) for text in source.read(later)]
                assert rest == [text for mine in texts[number + 1 :] for text in mine], (path, number)


class _Stopped(StopRequest):
    """One that was asked to stop before anything began."""

    def __init__(self) -> None:
        super().__init__()
        self.take(signal.SIGTERM)


def test_max_file_index_stops_there_and_a_later_call_goes_on(made: Path, tmp_path: Path) -> None:
    args = (made / "c.jsonl", made / "tokenizer.json")
    tokenize(*args, tmp_path / "whole", *FLAGS, "--chunksize", 100)
    out, said = tmp_path / "out", list[str]()
    first = tokenize(*args, out, *FLAGS, "--chunksize", 100, "--max_file_index", 1).manifest
    assert first is not None
    assert not first.complete
    assert [shard.name for shard in first.shards] == ["train_000000.bin", "train_000001.bin", "val_000000.bin"]
    assert {shard.name: shard.sha256 for shard in first.shards}.items() <= contents(out).items()
    assert not tokenize(*args, out, *FLAGS, "--max_file_index", 1).fresh
    tokenize(*args, out, *FLAGS, "--max_file_index", 2, say=said.append)
    assert sorted(p.name for p in out.glob("train*.bin")) == [f"train_{i:06d}.bin" for i in range(3)]
    assert said == ["continuing after 2 finished shards"]
    status = _in_a_process(lambda: tokenize(*args, out, *FLAGS, stop=_Stopped(), say=said.append))
    assert (status, read_manifest(out)) == (0, None)  # what it says of val_*.bin is no longer so
    last = tokenize(*args, out, *FLAGS, say=said.append)
    assert last.manifest is not None
    assert last.manifest.complete
    assert contents(out) == contents(tmp_path / "whole")


def test_documents_left_out_before_an_interruption_are_counted(made: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [text for pair in zip(TEXTS, [""] * 40, strict=True) for text in pair])
    args = (path, made / "tokenizer.json", tmp_path / "out", "--num_tokens_per_file", 300, "--chunksize", 3)
    first = tokenize(*args, "--max_file_index", 0).manifest
    last = tokenize(*args, say=lambda _: None).manifest
    assert first is not None
    assert last is not None
    assert 0 < first.empty < last.empty == 40


def test_min_file_index_leaves_out_the_files_before(made: Path, tmp_path: Path) -> None:
    args, said = (made / "c.jsonl", made / "tokenizer.json"), list[str]()
    tokenize(*args, tmp_path / "whole", *FLAGS)
    out = tmp_path / "out"
    manifest = tokenize(*args, out, *FLAGS, "--min_file_index", 2, say=said.append).manifest
    assert manifest is not None
    assert said[0] == f"files 0 to 1 are tokenized and dropped, because {out} does not record where they end"
    assert [line.split()[0] for line in said[1:]] == ["tokenized"]
    names = [shard.name for shard in manifest.shards_of("train")]
    assert names[0] == "train_000002.bin"
    assert sorted(p.name for p in out.glob("train_*.bin")) == names
    whole, here = contents(tmp_path / "whole"), contents(out)
    assert {name: here[name] for name in here if name != "manifest.json"}.items() <= whole.items()
    assert manifest.documents["train"] == sum(shard.documents for shard in manifest.shards_of("train"))
    with pytest.raises(ConfigError, match=r"--min_file_index 0: an earlier call left file 0 out of .*; use another"):
        tokenize(*args, out, *FLAGS)
    with pytest.raises(ConfigError, match=r"--min_file_index 1: an earlier call left file 1 out of .*; use another"):
        tokenize(*args, out, *FLAGS, "--min_file_index", 1, "--max_file_index", 1)
    with pytest.raises(DataError, match=r"--min_file_index 99: the data ends in file [0-9]+; use a smaller one"):
        tokenize(*args, tmp_path / "far", *FLAGS, "--min_file_index", 99, say=said.append)
    assert contents(tmp_path / "far") == {}


def test_min_file_index_skips_what_the_state_knows(made: Path, tmp_path: Path) -> None:
    args, out, said = (made / "c.jsonl", made / "tokenizer.json"), tmp_path / "out", list[str]()
    tokenize(*args, out, *FLAGS, "--max_file_index", 1)
    tokenize(*args, out, *FLAGS, "--min_file_index", 2, say=said.append)
    tokenize(*args, tmp_path / "whole", *FLAGS)
    assert said[0] == "continuing after 2 finished shards"
    assert [line.split()[0] for line in said[1:]] == ["tokenized"]
    assert tokens_of(out) == tokens_of(tmp_path / "whole")


# As a program.


def _start(made: Path, out: Path, *flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, "scripts/tokenize_dataset.py", "--dataset_path", made, "--output_dir", out]
    command += ["--tokenizer_path", made / "tokenizer.json", "--num_tokens_per_file", 2**13, *flags]
    words = [str(word) for word in command]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer.json")
    for seed in range(4):
        write_jsonl(folder / f"{seed}.jsonl", make_texts(400, seed, longest=400))
    return folder


def _workers_of(process: int) -> list[int]:
    """Processes, other than this, that run python and were started by it or by its fork server."""
    table = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in re.findall(r"^\s*(\d+)\s+(\d+)$", table, re.MULTILINE)}
    family = {process}
    for _ in range(3):
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sorted(family - {process})


@pytest.mark.slow
def test_kill_9_at_random_moments(corpus: Path, tmp_path: Path) -> None:
    tokenize(corpus, corpus / "tokenizer.json", tmp_path / "whole", "--num_tokens_per_file", 2**13)
    chance, kills = random.Random(int(time.time())), 0
    for _ in range(40):
        running = _start(corpus, tmp_path / "out", "--num_proc", 2, "--chunksize", 5)
        before = len(list((tmp_path / "out").glob("*.bin")))
        while running.poll() is None and len(list((tmp_path / "out").glob("*.bin"))) == before:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        family = _workers_of(running.pid)
        if kills < 6:
            running.kill()
        if running.wait() == 0:
            break
        kills += 1
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in family):
            assert time.monotonic() < deadline, "workers outlive the process they work for"
            time.sleep(0.05)
    assert kills >= 2
    assert read_manifest(tmp_path / "out") is not None
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.sample(1)
def test_a_signal_stops_it_cleanly(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    running = _start(corpus, tmp_path, "--num_proc", 2, "--chunksize", 2)
    while not list(tmp_path.glob("*.bin")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number, err
    assert f"stopped by {number.name}; the same command continues from here" in err
    assert "Traceback" not in err
    assert out == ""
    assert read_state(tmp_path) is not None
