"""The same command again: logs that are kept, runs that are named, and data that a run does not need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, losses, train, user_error
from tinytron.data import write_shard
from tinytron.training import Trainer
from tinytron.training.run.folder import another_of_this_name, run_folder

Pools = Callable[[int], Ranks]


def test_the_log_of_a_run_without_a_checkpoint_is_kept(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--no-do_save", "--log_every", 1)
    first = ranks(1).run(train, Trainer, tmp_path, *flags, "--max_steps", 4)[0]
    again = ranks(1).run(train, Trainer, tmp_path, *flags, "--max_steps", 2)[0]
    assert again.folder == first.folder
    assert len(losses(again.log)) == 2
    assert (first.folder / "log.txt.1").read_text() == first.log
    assert len((first.folder / "log.jsonl.1").read_text().splitlines()) == 4
    ranks(1).run(train, Trainer, tmp_path, *flags, "--max_steps", 1)
    assert (first.folder / "log.txt.2").read_text() == again.log


def test_the_traces_of_its_routers_are_kept_too(ranks: Pools, tmp_path: Path) -> None:
    experts = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)
    flags = ("--no-do_save", "--log_every", 1, "--max_steps", 2, *experts)
    first = ranks(2).run(train, Trainer, tmp_path, *flags, "--moe_route_trace")[0]
    traces = {path.name: path.read_bytes() for path in first.folder.glob("routes_rank*.jsonl")}
    assert sorted(traces) == ["routes_rank0.jsonl", "routes_rank1.jsonl"]
    ranks(1).run(train, Trainer, tmp_path, *flags, "--moe_route_trace")
    assert {path.name for path in first.folder.glob("routes_rank*.jsonl")} == {
        "routes_rank0.jsonl"
    }  # this run has one process
    assert {name: (first.folder / f"{name}.1").read_bytes() for name in traces} == traces


def test_a_resumed_run_and_debugging_set_nothing_aside(ranks: Pools, tmp_path: Path) -> None:
    for flags in (("--max_steps", 2), ("--max_steps", 4)):
        run = ranks(1).run(train, Trainer, tmp_path / "saved", *flags)[0]
    for _ in range(2):
        debug = ranks(1).run(train, Trainer, tmp_path / "debug", "--debug", "--max_steps", 2)[0]
    assert not [*run.folder.glob("log.*.1"), *debug.folder.glob("log.*.1")]


def test_the_run_that_a_changed_flag_leaves_is_named(ranks: Pools, tmp_path: Path) -> None:
    run = ranks(1).run(train, Trainer, tmp_path, "--max_steps", 2)[0]
    config = config_of(*TINY, "--log_dir", tmp_path, "--max_lr", 0.02)
    note = another_of_this_name(config, run_folder(config))
    assert note == f"this is a new run: {run.folder.name} has 2 steps, and differs in optim.max_lr"
    same = config_of(*TINY, "--log_dir", tmp_path)
    assert another_of_this_name(same, run_folder(same)) is None
    ranks(1).run(train, Trainer, tmp_path, "--max_steps", 2, "--exp_name", f"{config.logging.exp_name}_big")  # newer
    assert another_of_this_name(config, run_folder(config)) == note
    other = dataclasses.replace(config, logging=dataclasses.replace(config.logging, exp_name="other"))
    assert another_of_this_name(other, run_folder(other)) is None
    (run.folder / "config.json").write_text(json.dumps({"config": {}}))
    assert another_of_this_name(config, run_folder(config)) is None


def test_so_is_the_run_that_balanced_its_experts_over_other_sequences(ranks: Pools, tmp_path: Path) -> None:
    experts = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)
    flags = (*experts, "--moe_aux_loss_scope", "batch", "--max_steps", 2)
    run = ranks(1).run(train, Trainer, tmp_path, *flags)[0]
    same = config_of(*TINY, "--log_dir", tmp_path, *flags)
    config = dataclasses.replace(same, dp_size=2)
    note = another_of_this_name(config, run_folder(config))
    assert note == f"this is a new run: {run.folder.name} has 2 steps, and differs in train.balanced_sequences"
    description = json.loads((run.folder / "config.json").read_text())
    del description["balanced_sequences"]  # as before it was written down
    (run.folder / "config.json").write_text(json.dumps(description))
    assert another_of_this_name(config, run_folder(config)) is None


def test_a_longer_run_says_that_the_rate_follows(ranks: Pools, tmp_path: Path) -> None:
    ranks(1).run(train, Trainer, tmp_path, "--max_steps", 2)
    said = ranks(1).run(_said, tmp_path, "--max_steps", 4, "--grad_reduce_dtype", "bf16")[0]
    (changed,) = (line for line in said if "train.max_steps" in line)
    assert "train.max_steps: 2 in the checkpoint, 4 now; the learning rate follows" in changed
    assert any("parallel.grad_reduce_dtype: fp32 in the checkpoint, bf16 now" in line for line in said)


class _Listening(Trainer):
    """Keeps what it says."""

    def _say(self, *texts: str) -> None:
        self.__dict__.setdefault("said", []).extend(texts)
        super()._say(*texts)

    def report(self) -> list[str]:
        said: list[str] = self.said  # type: ignore[has-type]
        return said


def _said(log_dir: Path, *flags: object) -> list[str]:
    said: list[str] = train(_Listening, log_dir, *flags).extra
    return said


def test_validation_shards_that_are_too_short_stop_only_a_run_that_validates(ranks: Pools, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    write_shard(data / "train_0.bin", rng.integers(0, 61, 1000))
    write_shard(data / "val_0.bin", rng.integers(0, 61, 9))
    flags = ("--no-use_mock_data", "--dataset_path", data, "--max_steps", 1)
    for more in ((), ("--do_val", "--debug")):
        ranks(1).run(train, Trainer, tmp_path / "log", *flags, *more)
    error = ranks(1).run(user_error, Trainer, tmp_path / "log", *flags, "--do_val")[0]
    assert error.startswith(
        "DataError: --do_val: no validation shard has enough tokens for a sample, 13 at --seq_len 12"
    )
    assert "val_0.bin: 9" in error
    write_shard(data / "val_0.bin", [5])
    packed = ("--packing", "best_fit", "--eot_id", 0)
    ranks(1).run(train, Trainer, tmp_path / "log", *flags, *packed)
    error = ranks(1).run(user_error, Trainer, tmp_path / "log", *flags, *packed, "--do_val")[0]
    assert error.startswith(
        "DataError: --do_val: no validation shard has enough tokens for a sample, 2 at --seq_len 12"
    )
