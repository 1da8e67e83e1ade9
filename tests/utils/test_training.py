"""The steps of a run, random states, and files that appear whole or not at all."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from tinytron.errors import ConfigError
from tinytron.utils.training import (
    get_training_info,
    rng_state,
    seed_all,
    set_rng_state,
    use_deterministic_kernels,
    write_atomically,
)


@pytest.fixture(autouse=True)
def random_states_as_before() -> Iterator[None]:
    before = rng_state()
    yield
    set_rng_state(before)


def draw() -> tuple[float, list[float], list[float]]:
    return random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.randn(3).tolist()


def test_a_seed_fixes_every_generator() -> None:
    seed_all(5)
    first = draw()
    seed_all(5)
    assert draw() == first
    seed_all(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_large_seeds_are_accepted() -> None:
    seed_all(2**63)  # numpy's takes 32 bits


def test_random_states_come_back() -> None:
    seed_all(5)
    draw()  # leaves a second Gaussian cached in Python's and numpy's generators
    state = rng_state()
    expected = [draw() for _ in range(3)]
    seed_all(6)
    set_rng_state(state)
    assert [draw() for _ in range(3)] == expected


def test_random_states_pass_through_a_file_of_plain_types(tmp_path: Path) -> None:
    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_deterministic_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back as it was
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_file_and_its_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert order == ["file", "rename", "folder"]


def test_training_info_counts_steps_and_micro_batches() -> None:
    """The documented numbers: 1,280 samples of 4,096 tokens in global batches of 128 on 8 ranks are ten steps."""
    info = get_training_info(total_batch_size=524288, batch_size=8, seq_len=4096, dp_size=8, num_samples=1280)
    assert (info.grad_accum_steps, info.global_batch_samples, info.steps_per_epoch, info.max_steps) == (2, 128, 10, 10)
    sizes = {"total_batch_size": 64, "batch_size": 1, "seq_len": 16}
    assert get_training_info(**sizes, num_samples=11, max_epochs=3).max_steps == 8  # 33 samples by 4
    streamed = get_training_info(**sizes, max_train_tokens=65)
    assert (streamed.max_steps, streamed.steps_per_epoch) == (2, None)
    with pytest.raises(ConfigError, match=r"the training data has no length; .*--max_steps or --max_train_tokens"):
        get_training_info(**sizes)
    with pytest.raises(
        ConfigError, match=r"--total_batch_size 64 .* = 3 x 16 x 1 = 48; use a --batch_size of \[1, 2, 4\]"
    ):
        get_training_info(**sizes | {"batch_size": 3}, num_samples=11)
