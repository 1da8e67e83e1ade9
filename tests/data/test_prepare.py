"""Token shards from documents: every token once and in order, whole or not at all, prepared once and by one process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.ranks import Ranks
from tinytron.data import Shard, TokenShardDataset, find_shards, prepare, read_header
from tinytron.data.formats import open_shard
from tinytron.errors import ConfigError, DataError, TinytronError

DOCUMENTS = [[1, 2, 3], [], [4], list(range(5, 25)), [65535]]
TOKENS = [token for document in DOCUMENTS for token in document]


def _shards_in(folder: Path) -> list[list[int]]:
    return [open_shard(path).tolist() for path in sorted(folder.glob("*.bin"))]


def _tokens_in(folder: Path) -> list[int]:
    return [token for shard in _shards_in(folder) for token in shard]


# Writing.


def test_shards_hold_every_token_in_order_and_only_the_last_is_short(tmp_path: Path) -> None:
    written = prepare.write_token_shards(iter(DOCUMENTS), tmp_path, tokens_per_shard=7)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"train_{i:06d}.bin" for i in range(4)]
    assert [len(shard) for shard in _shards_in(tmp_path)] == [7, 7, 7, 4]
    assert _tokens_in(tmp_path) == TOKENS
    assert written == (5, 25, hashlib.sha256(np.array(TOKENS, "<u2").tobytes()).hexdigest())


@settings(deadline=None, max_examples=30)  # every shard is flushed to disk
@given(lengths=st.lists(st.integers(0, 12), max_size=8), tokens_per_shard=st.integers(1, 15))
def test_any_documents_and_shard_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], tokens_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    written = prepare.write_token_shards(documents, folder, tokens_per_shard=tokens_per_shard)
    assert _tokens_in(folder) == [token for document in documents for token in document]
    shards = _shards_in(folder)
    assert all(len(shard) == tokens_per_shard for shard in shards[:-1])
    assert all(shards), "no empty shard"
    assert written[:2] == (len(lengths), sum(lengths))


def test_a_shard_is_written_before_the_next_document_is_asked_for(tmp_path: Path) -> None:
    seen = []

    def documents() -> Iterator[list[int]]:
        for _ in range(3):
            yield [7] * 4
            seen.append(len(list(tmp_path.glob("*.bin"))))

    prepare.write_token_shards(documents(), tmp_path, tokens_per_shard=4)
    assert seen == [1, 2, 3]


def test_prefix_first_index_and_numpy_documents(tmp_path: Path) -> None:
    prepare.write_token_shards([np.array([70000, 1], np.int32)], tmp_path, "val", np.uint32, first_index=3)
    assert _tokens_in(tmp_path) == [70000, 1]
    (path,) = tmp_path.iterdir()
    assert path.name == "val_000003.bin"
    assert read_header(path).dtype == np.dtype("<u4")


def test_the_built_in_data_set_reads_the_shards_and_every_token_is_a_label(tmp_path: Path) -> None:
    prepare.write_token_shards([list(range(100)), list(range(100, 129))], tmp_path)
    dataset = TokenShardDataset([Shard(p) for p in find_shards(str(tmp_path), "train")], seq_len=16, vocab_size=129)
    labels = [int(label) for sample in range(len(dataset)) for label in dataset[sample]["labels"]]
    assert labels == list(range(1, 129))


@pytest.mark.parametrize(
    ("document", "dtype", "message"),
    [
        ([3, 65536], np.uint16, "document 2: token ids 3..65536 do not fit uint16; use uint32"),
        ([3, -1], np.uint32, "document 2: token ids -1..3 do not fit uint32"),
        ([2**32], np.uint32, f"document 2: token ids {2**32}..{2**32} do not fit uint32"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, document: list[int], dtype: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare.write_token_shards([[1], document], tmp_path, dtype=dtype)


@pytest.mark.parametrize("count", [0, -1, 2**31])
def test_shard_sizes_that_do_not_fit_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=rf"{count} tokens per shard must be in 1..{2**31 - 1}; use {2**24}"):
        prepare.write_token_shards([[1]], tmp_path, tokens_per_shard=count)


def test_the_smallest_type_that_holds_a_vocabulary() -> None:
    assert prepare.token_dtype(65536) == np.uint16
    assert prepare.token_dtype(65537) == np.uint32


def test_progress_is_printed_on_the_way_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(prepare.with_progress(DOCUMENTS, every=0.0)) == DOCUMENTS
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(DOCUMENTS) + 1
    assert lines[0].startswith("preparing: 1 documents, 3 tokens (")
    assert lines[-1].startswith("prepared 5 documents, 25 tokens (")
    assert lines[-1].endswith(" tokens/s)")
    said: list[str] = []
    list(prepare.with_progress(DOCUMENTS, say=said.append))
    assert len(said) == 1


# Once.


def _write(folder: Path) -> dict[str, Any]:
    return {"who": os.getpid(), **prepare.write_token_shards(DOCUMENTS, folder, tokens_per_shard=10)._asdict()}


def _refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"{folder} is prepared already")


def test_a_finished_preparation_is_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    assert prepare.prepared(folder) is None
    facts = prepare.prepare_once(folder, _write)
    assert facts["shards"] == {"train_000000.bin": 10, "train_000001.bin": 10, "train_000002.bin": 5}
    assert facts["tokens"] == 25
    assert prepare.prepared(folder) == facts
    assert prepare.prepare_once(folder, _refuse) == facts


def _truncate(folder: Path) -> None:
    path = folder / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _add(folder: Path) -> None:
    prepare.write_token_shards([[1]], folder, first_index=3)


def _shorten(folder: Path) -> None:
    prepare.write_token_shards([[1]], folder, first_index=2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / prepare.MARKER).unlink(),
        lambda folder: (folder / prepare.MARKER).write_text('{"shards'),
        lambda folder: (folder / prepare.MARKER).write_text("[]"),
        lambda folder: (folder / prepare.MARKER).write_text("{}"),
        lambda folder: (folder / "train_000001.bin").unlink(),
        _truncate,
        _shorten,
        _add,
    ],
    ids=["no marker", "torn marker", "list", "empty marker", "lost", "truncated", "other size", "one too many"],
)
def test_a_folder_that_is_not_whole_is_prepared_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    prepare.prepare_once(tmp_path, _write)
    damage(tmp_path)
    assert prepare.prepared(tmp_path) is None
    facts = prepare.prepare_once(tmp_path, _write)
    assert _tokens_in(tmp_path) == TOKENS
    assert prepare.prepared(tmp_path) == facts


def _die_in_the_middle(folder: Path) -> None:
    def documents() -> Iterator[list[int]]:
        yield list(range(25))
        os.kill(os.getpid(), signal.SIGKILL)

    def write(place: Path) -> dict[str, Any]:
        return prepare.write_token_shards(documents(), place, tokens_per_shard=5)._asdict()

    prepare.prepare_once(folder, write)


def test_a_killed_preparation_is_done_again_and_leaves_nothing(tmp_path: Path) -> None:
    process = mp.get_context("fork").Process(target=_die_in_the_middle, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert len(_shards_in(tmp_path)) == 5
    (tmp_path / "train_000005.bin.tmp").write_bytes(b"torn")
    assert prepare.prepared(tmp_path) is None
    prepare.prepare_once(tmp_path, _write)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {prepare.MARKER, prepare.LOCK, *(f"train_00000{i}.bin" for i in range(3))}
    assert _tokens_in(tmp_path) == TOKENS


def test_a_failed_preparation_leaves_no_marker(tmp_path: Path) -> None:
    def write(folder: Path) -> dict[str, Any]:
        _write(folder)
        raise DataError("the source ended badly")

    with pytest.raises(DataError, match="ended badly"):
        prepare.prepare_once(tmp_path, write)
    assert prepare.prepared(tmp_path) is None
    assert prepare.prepare_once(tmp_path, _write)["tokens"] == 25


def test_shards_of_others_are_not_touched(tmp_path: Path) -> None:
    prepare.write_token_shards([[1, 2]], tmp_path)
    with pytest.raises(DataError, match="holds token shards that were not prepared here; use another folder"):
        prepare.prepare_once(tmp_path, _write)
    assert _tokens_in(tmp_path) == [1, 2]


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache cannot be written .*; use a folder on a disk with space"):
        prepare.prepare_once(tmp_path / "file" / "cache", _write)


def _slow_write(folder: Path) -> dict[str, Any]:
    (folder / "started").touch()
    time.sleep(0.3)
    return _write(folder)


def test_a_second_process_waits_for_the_first_and_uses_its_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = mp.get_context("fork").Process(target=prepare.prepare_once, args=(tmp_path, _slow_write))
    other.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    facts = prepare.prepare_once(tmp_path, _refuse)
    other.join(30)
    assert facts["who"] == other.pid
    assert "waiting for another process that prepares" in capsys.readouterr().out


def test_a_file_system_without_locks_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DataError, match="No locks available"):
        prepare.prepare_once(tmp_path, _write)


def test_file_states_change_with_a_file_and_ignore_names_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    one, two = tmp_path / "folder" / "sub" / "one.txt", tmp_path / "two.txt"
    one.write_text("1")
    two.write_text("22")
    before = prepare.file_states([two, tmp_path / "folder", Path("gpt2-on-the-hub")])
    assert [(Path(path).name, size) for path, size, _ in before] == [("two.txt", 2), ("one.txt", 1)]
    os.utime(one, ns=(0, 5))
    after = prepare.file_states([two, tmp_path / "folder"])
    assert after[0] == before[0]
    assert after[1] == [*before[1][:2], 5]
    assert prepare.recipe_hash({"files": before}) != prepare.recipe_hash({"files": after})
    assert prepare.recipe_hash({"a": 1, "b": 2}) == prepare.recipe_hash({"b": 2, "a": 1})


# Together.


def _outcome(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except TinytronError as error:
        return f"{type(error).__name__}: {error}"


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _prepare_on_rank_zero(folder: Path) -> Any:
    facts = prepare.prepare_together(folder, _write, _world(), leader=dist.get_rank() == 0)
    return facts, os.getpid()


def _prepare_on_all(folder: Path) -> Any:
    return prepare.prepare_together(folder, _slow_write, _world(), leader=True)


def _fail_on_rank_one() -> Any:
    """Rank 0 would work for longer than a test may take."""

    def action() -> None:
        if dist.get_rank() == 0:
            time.sleep(30)
        raise ConfigError("HF_MAX_SAMPLES is wrong here")

    return _outcome(lambda: prepare.together_patiently(action, _world(), every=0.1))


def _slow_rank_zero() -> Any:
    """Rank 0 takes longer than the time after which this group's collectives give up."""
    group = dist.new_group(timeout=timedelta(seconds=0.5))

    def action() -> int:
        time.sleep(1.5 * (dist.get_rank() == 0))
        return dist.get_rank()

    return prepare.together_patiently(action, group, every=0.05)


def _different_nodes(folder: Path, recipe_only: bool) -> Any:
    rank = dist.get_rank()

    def write(place: Path) -> dict[str, Any]:
        written = prepare.write_token_shards([[7, 8 if recipe_only else 8 + rank]], place)
        return {"recipe": f"mtime {rank}", **written._asdict()}

    place = folder / f"node{rank}"
    return _outcome(lambda: prepare.prepare_together(place, write, _world(), leader=True)["tokens"])


def _unseen_folder(folder: Path) -> Any:
    rank = dist.get_rank()
    place = folder / f"node{rank}"
    return _outcome(lambda: prepare.prepare_together(place, _write, _world(), leader=rank == 0))


Pools = Callable[[int], Ranks]


def test_one_rank_prepares_and_all_know_the_facts(ranks: Pools, tmp_path: Path) -> None:
    (facts, pid), (other_facts, _) = ranks(2).run(_prepare_on_rank_zero, tmp_path)
    assert facts == other_facts == prepare.prepared(tmp_path)
    assert facts["who"] == pid


def test_two_leaders_of_one_folder_write_it_once(ranks: Pools, tmp_path: Path) -> None:
    first, second = ranks(2).run(_prepare_on_all, tmp_path)
    assert first == second


def test_a_failure_on_one_rank_is_the_same_error_on_all_at_once(ranks: Pools) -> None:
    start = time.monotonic()
    assert ranks(2).run(_fail_on_rank_one) == ["ConfigError: HF_MAX_SAMPLES is wrong here"] * 2
    assert time.monotonic() - start < 20


def test_ranks_meet_until_the_slowest_is_done_and_keep_their_own_results(ranks: Pools) -> None:
    assert ranks(2).run(_slow_rank_zero) == [0, 1]


def test_nodes_with_different_shards_are_an_error_but_other_paths_are_not(ranks: Pools, tmp_path: Path) -> None:
    answers = ranks(2).run(_different_nodes, tmp_path / "a", False)
    assert all("differs between nodes; give every node the same sources" in answer for answer in answers)
    assert ranks(2).run(_different_nodes, tmp_path / "b", True) == [2, 2]


def test_a_folder_that_a_rank_cannot_see_is_an_error_on_all(ranks: Pools, tmp_path: Path) -> None:
    for answer in ranks(2).run(_unseen_folder, tmp_path):
        assert answer.startswith("DataError: ")
        assert "node1: not prepared as seen from every process" in answer


def test_the_marker_is_plain_json_for_people(tmp_path: Path) -> None:
    prepare.write_token_shards(DOCUMENTS, tmp_path)
    facts = prepare.mark_prepared(tmp_path, {"recipe": {"files": ["a.txt"]}})
    assert json.loads((tmp_path / prepare.MARKER).read_text()) == facts
    assert facts == {"recipe": {"files": ["a.txt"]}, "shards": {"train_000000.bin": 25}}
