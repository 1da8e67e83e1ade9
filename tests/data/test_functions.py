"""Loader functions against the same thing written down as lists, and over worlds of 1, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.ranks import Ranks
from tinytron.data import write_shard
from tinytron.data.batch import as_batch
from tinytron.data.formats import write_weights
from tinytron.data.functions import DataLoaderFn, FunctionLoader, data_loader, data_loader_floats, get_num_tokens
from tinytron.errors import ConfigError, DataError

Rows = list[list[int]]


def straight(files: list[list[int]], world: int, rank: int, batch: int, block: int) -> list[tuple[Rows, Rows]]:
    """Inputs and labels of one rank: global batches cut from each file with the token after them, dealt to the ranks."""
    out = []
    for tokens in files:
        while len(tokens) >= world * batch * block:
            window, tokens = tokens[: world * batch * block], tokens[world * batch * block :]
            targets = [*window[1:], tokens[0] if tokens else -100]
            rows = [window[i : i + block] for i in range(0, len(window), block)]
            label_rows = [targets[i : i + block] for i in range(0, len(window), block)]
            mine = slice(rank * batch, (rank + 1) * batch)
            out.append((rows[mine], label_rows[mine]))
    return out


def write(folder: Path, lengths: list[int], dtype: Any = np.uint16) -> tuple[str, list[list[int]]]:
    """Files whose tokens are all different, in the order of their names but written backwards; their pattern."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    files = [list(range(first, first + length)) for first, length in zip(starts, lengths, strict=True)]
    for number in reversed(range(len(files))):
        write_shard(folder / f"train_{number:02d}.bin", files[number], dtype)
    (folder / "other_0.bin").write_bytes(b"no shard")
    return str(folder / "train_*.bin"), files


def as_lists(pattern: str, batch: int, block: int) -> list[tuple[Rows, Rows]]:
    return [(item["input_ids"].tolist(), item["labels"].tolist()) for item in data_loader(pattern, batch, block)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    block=st.integers(1, 5),
    wide=st.booleans(),
)
def test_one_process_reads_what_straight_code_reads(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch: int, block: int, wide: bool
) -> None:
    pattern, files = write(tmp_path_factory.mktemp("shards"), lengths, np.uint32 if wide else np.uint16)
    assert get_num_tokens(pattern) == sum(lengths)
    loader = FunctionLoader(data_loader, pattern, batch, block)
    if max(lengths) < batch * block:
        for ask in (lambda: data_loader(pattern, batch, block), lambda: loader.num_samples):
            with pytest.raises(DataError, match="holds one global batch"):
                ask()
        return
    expected = straight(files, 1, 0, batch, block)
    assert as_lists(pattern, batch, block) == expected
    assert loader.num_samples == len(expected) * batch


LENGTHS = [24, 7, 49, 48, 0, 31]


def _read_my_part(pattern: str, weights: str) -> Any:
    tokens = as_lists(pattern, 2, 3)
    floats = [item["weights"].tolist() for item in data_loader_floats(weights, 2, 3)]
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    pairs = [(t["input_ids"].tolist(), t["labels"].tolist()) for t in data_loader(pattern, 2, 3, group=alone)]
    loaders = [FunctionLoader(data_loader, pattern, 2, 3, group=group) for group in (None, alone)]
    return tokens, floats, pairs, [loader.num_samples for loader in loaders]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_every_global_batch(world: int, ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """24 and 48 tokens end on a batch for every world, 49 have one more token, 31 another part of rank 0; 7 are too few for
    two ranks."""
    pattern, files = write(tmp_path, LENGTHS)
    for number, tokens in enumerate(files):
        write_weights(tmp_path / f"weights_{number}.bin", [t + 0.5 for t in tokens])
    results = ranks(world).run(_read_my_part, pattern, str(tmp_path / "weights_*.bin"))
    whole = straight(files, 1, 0, 2 * world, 3)  # the global batches
    for rank, (tokens, floats, alone, samples) in enumerate(results):
        expected = straight(files, world, rank, 2, 3)
        assert tokens == expected
        assert alone == straight(files, 1, 0, 2, 3)  # a group of one reads everything
        assert samples == [len(whole) * 2 * world, len(alone) * 2]
        for weights, (_, labels) in zip(floats, expected, strict=True):
            assert weights == [[0 if label == -100 else label + 0.5 for label in row] for row in labels]
    assert [[row for r in results for row in r[0][step][0]] for step in range(len(whole))] == [w[0] for w in whole]
    ignored = [sum(row.count(-100) for _, labels in r[0] for row in labels) for r in results]
    assert ignored == [0] * (world - 1) + [2]  # of the last rank only: after 24 and 48 tokens


def test_types_and_shapes(tmp_path: Path) -> None:
    pattern, _ = write(tmp_path, [25])
    item = next(data_loader(pattern, 2, 3))
    assert {key: (t.dtype, tuple(t.shape)) for key, t in item.items()} == {
        "input_ids": (torch.int32, (2, 3)),
        "labels": (torch.int64, (2, 3)),
    }
    batch = as_batch(item)
    assert batch.input_ids.dtype == torch.int64
    write_weights(tmp_path / "w.bin", np.ones(6))
    (weights,) = data_loader_floats(str(tmp_path / "w.bin"), 2, 3)
    assert weights["weights"].dtype == torch.float32
    assert weights["weights"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_what_is_given_can_be_written_to(tmp_path: Path) -> None:
    """The files are mapped read-only; a batch is a copy."""
    pattern, files = write(tmp_path, [12])
    for item in data_loader(pattern, 2, 3):
        item["input_ids"].zero_()
        item["labels"].zero_()
    assert as_lists(pattern, 2, 3) == straight(files, 1, 0, 2, 3)


def test_a_loader_can_be_read_again(tmp_path: Path) -> None:
    pattern, files = write(tmp_path, [13, 20])
    calls: list[Any] = []

    def fn(*args: Any) -> Any:
        calls.append(args)
        return data_loader(*args)

    function: DataLoaderFn = fn
    loader = FunctionLoader(function, pattern, 2, 3)
    for _ in range(2):
        assert [item["input_ids"].tolist() for item in loader] == [row for row, _ in straight(files, 1, 0, 2, 3)]
    next(iter(loader))
    assert [item["input_ids"].tolist() for item in loader] == [row for row, _ in straight(files, 1, 0, 2, 3)]
    assert calls == [(pattern, 2, 3)] * 4


# Errors come with the call, before the first batch.


ASKING: dict[str, Callable[[str], object]] = {
    "data_loader": lambda pattern: data_loader(pattern, 2, 3),
    "data_loader_floats": lambda pattern: data_loader_floats(pattern, 2, 3),
    "get_num_tokens": get_num_tokens,
    "FunctionLoader": lambda pattern: FunctionLoader(data_loader, pattern, 2, 3).num_samples,
}


@pytest.mark.parametrize("name", ASKING)
def test_a_pattern_without_files(tmp_path: Path, name: str) -> None:
    text = rf"the pattern '{tmp_path}/train_\*\.bin' matches no file; .*'shards/train_\*\.bin'"
    with pytest.raises(DataError, match=text):
        ASKING[name](f"{tmp_path}/train_*.bin")


@pytest.mark.parametrize("name", ASKING)
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    pattern, _ = write(tmp_path, [20, 20])
    (tmp_path / "train_01.bin").write_bytes(b"no shard")
    with pytest.raises(DataError, match=r"train_0[01]\.bin: "):
        ASKING[name](pattern)


@pytest.mark.parametrize("name", ["data_loader", "data_loader_floats", "FunctionLoader"])
def test_files_that_are_all_too_short(tmp_path: Path, name: str) -> None:
    for number, length in enumerate((4, 5, 0)):
        values = np.zeros(length, np.float32 if name == "data_loader_floats" else np.uint16)
        (write_weights if name == "data_loader_floats" else write_shard)(tmp_path / f"{number}.bin", values)
    text = (
        r"no file of '.*/\*\.bin' holds one global batch of 1 ranks x 2 x 3 = 6 values: the longest, 1\.bin, has 5; "
        "use a smaller per_device_batch_size or block_size"
    )
    with pytest.raises(DataError, match=text):
        ASKING[name](f"{tmp_path}/*.bin")


@pytest.mark.parametrize(
    "fn", [data_loader, data_loader_floats, lambda *a: FunctionLoader(data_loader, *a).num_samples]
)
def test_sizes_below_one(tmp_path: Path, fn: Any) -> None:
    pattern, _ = write(tmp_path, [20])
    with pytest.raises(ConfigError, match="per_device_batch_size 0 must be at least 1; use 8"):
        fn(pattern, 0, 3)
    with pytest.raises(ConfigError, match="block_size -1 must be at least 1; use 1024"):
        fn(pattern, 2, -1)


def test_an_id_too_large_for_int32(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2, 3, 2**31 - 1, 5, 2**31], np.uint32)
    with pytest.raises(
        DataError, match=r"a\.bin: token id 2147483648 is above 2147483647; the file is damaged, write it again"
    ):
        list(data_loader(str(tmp_path / "a.bin"), 1, 3))
    first = next(data_loader(str(tmp_path / "a.bin"), 1, 3))
    assert first["labels"].tolist() == [[2, 3, 2**31 - 1]]
