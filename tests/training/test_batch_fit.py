"""``--batch_size auto``: the largest micro-batch that divides the batch and fits every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, train
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.training import Trainer, batch_fit, memory
from tinytron.training.batch_fit import sizes_that_fit, with_batch_size
from tinytron.training.dry_run import plan_run
from tinytron.training.memory import estimated_bytes
from tinytron.utils.memory import Memory

CPU = torch.device("cpu")
AUTO = (*TINY, "--batch_size", "auto")  # 8 sequences a step
LAYOUT = ParallelLayout(1, 1, 1)


def _memory_for(batch_size: int, **flags: Any) -> Memory:
    """Memory in which this micro-batch just fits."""
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    needed = estimated_bytes(with_batch_size(config_of(*AUTO, *words), batch_size), LAYOUT, CPU)
    return Memory(10**12, int(needed / 0.9) + 2)


@pytest.mark.parametrize(("limit", "expected"), [(8, [8, 4, 2, 1]), (4, [4, 2, 1]), (1, [1])])
def test_the_largest_that_the_estimate_allows_comes_first(limit: int, expected: list[int]) -> None:
    assert sizes_that_fit(config_of(*AUTO), LAYOUT, CPU, _memory_for(limit)) == expected


def test_a_tenth_of_the_memory_is_kept_free() -> None:
    needed = estimated_bytes(with_batch_size(config_of(*AUTO), 4), LAYOUT, CPU)
    assert sizes_that_fit(config_of(*AUTO), LAYOUT, CPU, Memory(10**12, needed)) == [2, 1]


def test_sizes_divide_the_batch_of_a_rank() -> None:
    config = config_of(*AUTO, "--total_batch_size", 12 * 12)
    assert sizes_that_fit(config, LAYOUT, CPU, Memory(10**12, 10**12)) == [12, 6, 4, 3, 2, 1]
    assert sizes_that_fit(config, ParallelLayout(2, 1, 1), CPU, Memory(10**12, 10**12)) == [6, 3, 2, 1]


def test_what_cannot_be_fitted_is_one_error() -> None:
    with pytest.raises(
        ConfigError, match=r"one sequence needs about .* GiB, but only 0\.0 are free; use --recompute full"
    ):
        sizes_that_fit(config_of(*AUTO), LAYOUT, CPU, Memory(10**12, 10))
    with pytest.raises(ConfigError, match=r"must be a multiple of --seq_len x data-parallel ranks = 36; use 108"):
        sizes_that_fit(config_of(*AUTO), ParallelLayout(3, 1, 1), CPU, Memory(10**12, 10**12))
    experts = (
        "--use_moe",
        "--num_experts",
        4,
        "--num_experts_per_tok",
        2,
        "--moe_intermediate_size",
        8,
        "--moe_aux_loss_scope",
        "batch",
    )
    with pytest.raises(ConfigError, match="whose loss depends on the micro-batch"):
        sizes_that_fit(config_of(*AUTO, *experts), LAYOUT, CPU, Memory(10**12, 10**12))
    with pytest.raises(ConfigError, match="--dry_run needs a number"):
        plan_run(config_of(*AUTO), 1)


def test_zero_and_words_in_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  batch_size: auto\n")
    assert config_of("--config", tmp_path / "run.yaml").train.batch_size == config_of(*AUTO).train.batch_size == 0
    with pytest.raises(ConfigError, match=r"--batch_size -1 must be at least 1, or auto; use 8"):
        config_of("--batch_size", -1)
    with pytest.raises(ConfigError, match="'most' is not a whole number"):
        config_of("--batch_size", "most")


class Fitted(Trainer):
    """Rank 0 has memory for two sequences; all have a device whose micro-batches are tried."""

    tried: list[int]

    def _fit_batch_size(self, config):  # type: ignore[no-untyped-def]
        self.tried = []
        limits = [2, 4] if self.state.layout.dp == 2 else [8]

        def tried(config, state) -> None:  # type: ignore[no-untyped-def]
            self.tried.append(config.train.batch_size)
            if config.train.batch_size > 1 and state.rank == 1 and state.layout.dp == 2:
                raise torch.OutOfMemoryError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch_fit, "memory_of", lambda device: _memory_for(limits[self.state.rank]))
            patch.setattr(batch_fit, "_probes", lambda state: True)
            patch.setattr(batch_fit, "run_micro_batch", tried)
            patch.setattr(memory, "processes_of_node", lambda: 1)
            return super()._fit_batch_size(config)

    def report(self) -> tuple[int, list[int], int]:
        return self.config.train.batch_size, self.tried, self.training_info.grad_accum_steps


def test_all_ranks_take_what_fits_the_smallest(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Rank 0 has memory for two sequences, and rank 1 runs out when it tries them."""
    pool: Ranks = ranks(2)
    runs = pool.run(train, Fitted, tmp_path, "--batch_size", "auto", "--max_steps", 2)
    assert [run.extra for run in runs] == [(1, [2, 1], 4)] * 2
    recorded = json.loads((runs[0].folder / "config.json").read_text())
    assert recorded["config"]["train"]["batch_size"] == 1
    by_hand = pool.run(train, Trainer, tmp_path / "by_hand", "--batch_size", 2, "--max_steps", 2)[0]
    assert by_hand.folder.name == runs[0].folder.name  # the same run, which another machine may continue
    one = ranks(1).run(train, Fitted, tmp_path / "one", "--batch_size", "auto", "--max_steps", 2)[0]
    assert one.extra == (8, [8], 1)
    assert one.log.splitlines()[0] == runs[0].log.splitlines()[0]


def test_a_micro_batch_is_tried_with_a_model_of_its_own(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ranks(1).run(_try_micro_batch, tmp_path)


def _try_micro_batch(folder: Path) -> None:
    trainer = Trainer(config_of(*TINY, "--max_steps", 1, "--log_dir", folder))
    before = [parameter.clone() for parameter in trainer.raw_model.parameters()]
    batch_fit.run_micro_batch(trainer.config, trainer.state)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.raw_model.parameters(), strict=True))


def test_another_model_needs_a_number(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    error = ranks(1).run(_own_model_error, tmp_path)[0]
    assert "can only estimate the memory of Tinytron's own model; give a number such as 8" in error


class Own(Trainer):
    def _init_model(self, config):  # type: ignore[no-untyped-def]
        super()._init_model(config)


def _own_model_error(folder: Path) -> str:
    try:
        train(Own, folder, "--batch_size", "auto")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_a_micro_batch_is_lowered_to_one_that_divides(ranks, tmp_path: Path, world: int) -> None:  # type: ignore[no-untyped-def]
    """Eight sequences a step: of five and seven, four divide them on one rank and on each of two."""
    pool: Ranks = ranks(world)
    flags = ("--max_steps", 2, "--batch_size")
    lowered = [pool.run(train, Trainer, tmp_path / str(size), *flags, size, "--fit_batch")[0] for size in (5, 7)]
    plain = pool.run(train, Trainer, tmp_path / "plain", *flags, 4)[0]
    for run in lowered:
        assert run.log == plain.log
        recorded = json.loads((run.folder / "config.json").read_text())
        assert recorded["config"]["train"]["batch_size"] == 4
    with pytest.raises(ConfigError, match="must be a multiple of --batch_size x --seq_len"):
        plan_run(config_of(*TINY, "--batch_size", 5), world)
    assert plan_run(config_of(*TINY, "--batch_size", 5, "--fit_batch"), world)[1].batch_size == 4
