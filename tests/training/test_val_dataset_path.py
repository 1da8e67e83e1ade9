"""``--val_dataset_path``: validation shards of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import config_of, losses, train, user_error
from tinytron.data.formats import write_shard
from tinytron.errors import ConfigError
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]


SHORT = ("--no-use_mock_data", "--do_val", "--max_steps", 2)


def shards(folder: Path, *names: str, count: int = 200) -> str:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        write_shard(folder / name, np.random.default_rng(seed).integers(0, 61, count))
    return str(folder)


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_is_that_of_the_same_shards_found_by_name(ranks: Pools, tmp_path: Path, world: int) -> None:
    both = shards(tmp_path / "both", "val_0.bin", "train_0.bin")
    shutil.move(shutil.copytree(both, tmp_path / "cut") / "val_0.bin", tmp_path / "held_out.bin")
    pool = ranks(world)
    expected = pool.run(train, Trainer, tmp_path / "a", *SHORT, "--dataset_path", both)[0]
    own = ("--dataset_path", tmp_path / "cut", "--val_dataset_path", tmp_path / "held_out.bin")
    found = pool.run(train, Trainer, tmp_path / "b", *SHORT, *own)[0]
    assert losses(found.log, "val") == losses(expected.log, "val") != {}
    assert found.folder.name == expected.folder.name  # the same run, wherever its data is


def test_a_mixture_is_validated_on_them_alone(ranks: Pools, tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", "val_0.bin", "train_0.bin")
    sources = [{"name": "a", "path": folder, "weight": 1}]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    write_shard(tmp_path / "zeros.bin", [0] * 200)
    flags = (*SHORT, "--dataset_path", tmp_path / "mixture.json")
    run = ranks(1).run(train, Trainer, tmp_path / "log", *flags, "--val_dataset_path", tmp_path / "zeros.bin")[0]
    named = ranks(1).run(train, Trainer, tmp_path / "log2", *flags)[0]
    assert losses(run.log, "val") != losses(named.log, "val")


def test_what_does_not_fit_is_one_error_on_all_ranks(ranks: Pools, tmp_path: Path) -> None:
    data = shards(tmp_path / "data", "train_0.bin", "train_1.bin")
    pool, flags = ranks(2), (*SHORT, "--dataset_path", data, "--val_dataset_path")
    for path, text in (
        (tmp_path / "none", "has no token shards; give a file, a folder with *.bin, or a pattern"),
        (data, "train_0.bin is training data, too"),
    ):
        told = pool.run(user_error, Trainer, tmp_path / "log", *flags, path)
        assert told[0] == told[1]
        assert text in told[0]
    write_shard(tmp_path / "wide.bin", [1, 2, 3, 70] * 9)
    assert "wide.bin: token id 70" in pool.run(user_error, Trainer, tmp_path / "log", *flags, tmp_path / "wide.bin")[0]
    with pytest.raises(ConfigError, match=r"--val_dataset_path x needs shards to train on; give --dataset_path too"):
        config_of("--val_dataset_path", "x")
