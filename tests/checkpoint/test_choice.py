"""From which checkpoint a run goes on, and from which it must not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses, train, user_error
from tests.helpers.stopping import owned, run_until, said_until, whole
from tinytron.checkpoint.meta import FORMAT_VERSION, CheckpointMeta
from tinytron.data import write_shard
from tinytron.errors import CheckpointError
from tinytron.training import Trainer
from tinytron.training.run.resume import check_continues

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = ("--max_steps", 4, "--save_every_steps", 2, "--lr_schedule", "constant")


@pytest.fixture(scope="module")
def done(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with checkpoints 2 and 4; not to be changed."""
    return ranks(1).run(train, Trainer, tmp_path_factory.mktemp("done"), *FLAGS)[0].folder


@pytest.mark.parametrize(("name", "first"), [("", 5), ("00002_model.pt", 3), ("00002_opt", 3), ("00004_meta.pt", 5)])
def test_resume_path_names_a_folder_or_a_checkpoint(
    ranks: Pools, tmp_path: Path, done: Path, name: str, first: int
) -> None:
    flags = (*FLAGS, "--max_steps", 6, "--exp_name", "other", "--resume_path", done / name)
    result = ranks(2).run(train, Trainer, tmp_path, *flags)[0]
    assert result.folder.parent == tmp_path
    assert list(losses(result.log)) == list(range(first, 7))
    unbroken = ranks(1).run(train, Trainer, tmp_path / "unbroken", *FLAGS, "--max_steps", 6)[0]
    assert losses(result.log) == pytest.approx({s: losses(unbroken.log)[s] for s in range(first, 7)}, rel=1e-5)


def test_a_requeued_run_goes_on_where_it_got_to(ranks: Pools, tmp_path: Path, done: Path) -> None:
    """--resume_path is where a run starts; once it has checkpoints of its own, the same command takes those."""
    flags = (*FLAGS, "--exp_name", "other", "--resume_path", done / "00002_model.pt")
    first = ranks(1).run(run_until, tmp_path, 4, *flags, "--max_steps", 6)[0]
    assert list(losses(first.log)) == [3, 4]
    again = ranks(1).run(train, Trainer, tmp_path, *flags, "--max_steps", 6)[0]
    assert again.log.startswith(first.log)
    assert list(losses(again.log)) == [3, 4, 5, 6]


def test_the_own_folder_as_resume_path_does_not_go_back(ranks: Pools, tmp_path: Path) -> None:
    whole = ranks(1).run(train, Trainer, tmp_path, *FLAGS)[0]
    back = ranks(1).run(train, Trainer, tmp_path, *FLAGS, "--resume_path", whole.folder / "00002_model.pt")[0]
    assert back.log == whole.log
    assert back.step == 4


def _begun(log_dir: Path, *flags: object) -> Run:
    """A run that has loaded what it begins with, and no more. A job for the pool."""
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, *flags))
    return Run(trainer.log_dir, trainer.step, "", [], owned(trainer))


@pytest.mark.parametrize("world", [1, 2])
def test_the_states_of_another_optimizer_are_left_out(ranks: Pools, tmp_path: Path, done: Path, world: int) -> None:
    """Muon begins with AdamW's weights: its own states are those of two steps, not of six."""
    flags = (*FLAGS, "--exp_name", "muon", "--optimizer", "muon", "--resume_path", done, "--save_every_steps", 1)
    saved = whole(ranks(1).run(run_until, done.parent, 0, *FLAGS))
    loaded = whole(ranks(world).run(_begun, tmp_path, *flags))
    assert loaded.keys() == {key for key in saved if key.endswith("/main")}
    assert all((loaded[key] == saved[key]).all() for key in loaded)
    line = "the optimizer was AdamW and is now Muon: momentum and other state does not fit and starts from zero"
    runs = ranks(world).run(said_until, tmp_path, 0, *flags, "--max_steps", 6)
    assert line in runs[0][1]
    states = whole([run for run, _ in runs])
    assert {key.rsplit("/")[-1] for key in states} == {"main", "momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert all((values == 2).all() for key, values in states.items() if key.endswith("/step"))
    again = ranks(1).run(said_until, tmp_path, 0, *flags, "--max_steps", 6)[0][1]
    assert "starts from zero" not in again  # its own checkpoint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "is neither a run folder nor a checkpoint file"),
        ("00003_model.pt", "checkpoint 3 is incomplete; it needs 00003_model.pt, 00003_opt/ and 00003_meta.pt"),
        ("..", "holds no complete checkpoint"),
    ],
)
def test_a_resume_path_without_checkpoint_is_one_error(
    ranks: Pools, tmp_path: Path, done: Path, name: str, message: str
) -> None:
    first, second = ranks(2).run(user_error, Trainer, tmp_path, *FLAGS, "--resume_path", done / name)
    assert first == second
    assert re.match(f"CheckpointError: --resume_path .*{message}", first)


def test_no_resume_moves_the_old_run_aside(ranks: Pools, tmp_path: Path) -> None:
    logs = [ranks(2).run(train, Trainer, tmp_path, *FLAGS, "--no-resume", "--max_steps", n)[0] for n in (1, 2, 3)]
    name = logs[0].folder.name
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.1", f"{name}.2"]
    assert list(losses((tmp_path / f"{name}.1/log.txt").read_text())) == [1]
    assert list(losses((tmp_path / f"{name}.2/log.txt").read_text())) == [1, 2]
    assert list(losses((tmp_path / name / "log.txt").read_text())) == [1, 2, 3]
    assert (tmp_path / f"{name}.2/00002_meta.pt").exists()


def test_a_debug_run_starts_anew_and_saves_nothing(ranks: Pools, tmp_path: Path) -> None:
    saved = ranks(1).run(run_until, tmp_path, 2, *FLAGS)[0]
    before = {p: p.read_bytes() for p in saved.folder.rglob("0*") if p.is_file()}
    result = ranks(1).run(train, Trainer, tmp_path, *FLAGS, "--debug", "--max_steps", 3)[0]
    assert list(losses(result.log)) == [1, 2, 3]
    assert {p: p.read_bytes() for p in saved.folder.rglob("0*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hidden_size", 32), r"model\.hidden_size: 16 in the checkpoint, 32 now"),
        (("--no-tied_lm_head",), r"model\.tied_lm_head: True in the checkpoint, False now"),
        (("--total_batch_size", 192), r"train\.total_batch_size: 96 in the checkpoint, 192 now"),
        (("--seq_len", 6), r"train\.seq_len: 12 in the checkpoint, 6 now"),
        (("--seed", 7), r"seed\.seed: 1337 in the checkpoint, 7 now"),
        (
            ("--mock_data_num_samples", 40),
            r"was trained on other data \(mock:32:12:61:1337:0, now mock:40:12:61:1337:0\)",
        ),
    ],
    ids=["model", "tied", "batch", "seq_len", "seed", "data"],
)
def test_another_run_cannot_be_continued(
    ranks: Pools, tmp_path: Path, done: Path, flags: tuple[object, ...], message: str
) -> None:
    flags = (*FLAGS, *flags, "--resume_path", done)
    first, second = ranks(2).run(user_error, Trainer, tmp_path, *flags)
    assert first == second
    assert first.startswith(f"CheckpointError: {done}/00004_meta.pt")
    assert re.search(message, first)
    assert "\n" not in first


def test_other_shards_under_the_same_flags_are_refused(ranks: Pools, tmp_path: Path) -> None:
    """The path is not part of the run's identity, the tokens are."""
    for number in (0, 1):
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        write_shard(folder / "train_0.bin", np.random.default_rng(number).integers(0, 61, 1000))
    flags = (*FLAGS, "--no-use_mock_data", "--dataset_path")
    ranks(1).run(train, Trainer, tmp_path / "log", *flags, tmp_path / "data0", "--max_steps", 2)
    (tmp_path / "data0").rename(tmp_path / "moved")
    ranks(1).run(train, Trainer, tmp_path / "log", *flags, tmp_path / "moved", "--max_steps", 4)
    (error,) = ranks(1).run(user_error, Trainer, tmp_path / "log", *flags, tmp_path / "data1")
    assert re.search(r"CheckpointError: .*/00004_meta.pt was trained on other data \(shards:", error)


def test_another_learning_rate_is_the_users_choice(ranks: Pools, tmp_path: Path, done: Path) -> None:
    flags = (*FLAGS, "--max_steps", 6, "--max_lr", 0.02, "--weight_decay", 0, "--resume_path", done)
    result = ranks(1).run(train, Trainer, tmp_path, *flags)[0]
    assert [record["lr"] for record in result.records] == [0.02, 0.02]


def test_a_checkpoint_from_before_an_option_had_it_at_its_default() -> None:
    config = config_of("--qk_norm", "--packing", "best_fit")
    identity = {k: v for k, v in config.identity().items() if k not in ("model.qk_norm", "data.packing", "model.bias")}
    meta = CheckpointMeta(format=FORMAT_VERSION, identity=identity, data="x")
    with pytest.raises(CheckpointError, match=r"different run \(model.qk_norm: False in the checkpoint, True now\)"):
        check_continues(config, meta, "x", "old")
    config = config_of("--packing", "best_fit")
    assert check_continues(config, meta, "x", "old") == ["data.packing: concat in the checkpoint, best_fit now"]
