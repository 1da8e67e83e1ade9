"""The quick estimate against the plan, which is measured against runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import config_of
from tests.planner.test_step import GQA, STEPS, WIDE, WIDE_EXPERTS
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.model import GPT
from tinytron.planner.estimate import Estimate
from tinytron.training.batch_fit import sizes_that_fit
from tinytron.training.dry_run import plan_run
from tinytron.training.memory import compare, estimated_bytes
from tinytron.utils import memory
from tinytron.utils.memory import GIB, Memory, memory_of
from tinytron.utils.training import DTYPES

CPU = torch.device("cpu")
NOT_COUNTED = {"plain attention", "dropout"}
MORE: dict[str, tuple[int, tuple[object, ...]]] = {
    "many ranks": (16, (*GQA, "--total_batch_size", 16384)),
    "many ranks, whole states": (16, (*GQA, "--total_batch_size", 16384, "--no-use_distributed_optimizer")),
    "many ranks of experts": (16, (*WIDE_EXPERTS, "--total_batch_size", 16384, "--ep_size", 4)),
    "shared expert": (1, (*WIDE_EXPERTS, "--num_shared_experts", 1, "--first_k_dense", 1)),
}
LORA = ("--resume_path", "a run", "--lora_rank", 8)
MORE |= {
    "adapters": (1, (*GQA, *LORA)),
    "adapters beside experts": (4, (*WIDE_EXPERTS, *LORA, "--total_batch_size", 4096, "--ep_size", 4)),
}
CASES = {name: case for name, case in {**STEPS, **MORE}.items() if name not in NOT_COUNTED}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(8)
def test_the_estimate_is_within_a_quarter_of_the_plan(name: str) -> None:
    world, flags = CASES[name]
    config = config_of(*WIDE, "--use_mock_data", *flags)
    plan, work, layout = plan_run(config, world)
    estimate = Estimate(
        dtype=DTYPES[config.train.precision], batch_size=work.batch_size, seq_len=work.seq_len,
        recompute=work.recompute, shard=config.parallel.use_distributed_optimizer, on_cpu=True,
        lora_rank=config.lora.lora_rank,
    )  # fmt: skip
    assert 0.75 < estimate.bytes(config.model, layout) / plan.peak < 1.1


# The messages.


def test_a_frozen_model_costs_its_weights() -> None:
    """The ranks of ep share the weights of its experts; each rank has all the others."""
    work: dict[str, Any] = {"dtype": torch.float32, "batch_size": 1, "seq_len": 64}
    dense, mixed = (config_of(*WIDE, *flags).model for flags in (GQA, WIDE_EXPERTS))
    for layout in (ParallelLayout(1), ParallelLayout(4, 1, 4)):
        alone = Estimate(**work).bytes(dense, layout)
        both = Estimate(**work, frozen=(dense, mixed)).bytes(dense, layout)
        made = [GPT(dense, device="meta", seed=None), GPT(mixed, device="meta", seed=None)]
        experts = sum(p.numel() for name, p in made[1].named_parameters() if ".experts." in name)
        weights = sum(p.numel() for model in made for p in model.parameters())
        assert experts > 0
        assert both - alone == 4 * (weights - experts + experts // layout.ep)


def test_a_frozen_model_may_be_what_does_not_fit() -> None:
    config, layout = config_of(*BIG), ParallelLayout(1)
    needed = [estimated_bytes(config, layout, CPU, (config.model,) * count) for count in (0, 1)]
    room = Memory(needed[1] - 1, needed[1] - 1)
    assert compare(config, layout, CPU, room) == []
    (line,) = compare(config, layout, CPU, room, (config.model,))
    assert line.startswith(f"this run needs about {needed[1] / GIB:.1f} GiB")
    with pytest.raises(ConfigError, match="this run needs about"):
        compare(config, layout, CPU, room, (config.model,) * 10)
    enough = Memory(10**12, int(needed[0] / 0.9) + 2)
    sizes = [sizes_that_fit(config, layout, CPU, enough, (config.model,) * count)[0] for count in (0, 1)]
    assert sizes == [16, 8]


BIG = (
    *("--num_layer", 12, "--num_attention_heads", 16, "--hidden_size", 1024, "--seq_len", 1024, "--vocab_size", 50304),
    *("--total_batch_size", 16384, "--batch_size", 16),
)


def say(total: float, free: float, *flags: object, local: str = "1") -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", local)
        layout = ParallelLayout(int(local))
        return compare(config_of(*BIG, *flags), layout, CPU, Memory(int(total * GIB), int(free * GIB)))


def test_what_fits_is_not_worth_a_word() -> None:
    assert say(64, 32) == []


def test_what_does_not_fit_in_what_is_free_is_said_with_a_way_out() -> None:
    (line,) = say(64, 6)
    assert line.startswith("this run needs about 11.")
    assert "this machine has 64.0 (6.0 free): the run may fail, or be very slow; use --batch_size " in line
    size = int(line.split("--batch_size ")[1].split(";")[0])
    assert say(64, 6, "--batch_size", size) == []
    assert say(64, 6, "--batch_size", 2 * size) != []


def test_what_cannot_fit_is_refused() -> None:
    text = (
        r"this run needs about 11\.\d GiB, but this machine has 8\.0 \(5.0 free\); use --batch_size 1; --dry_run shows"
    )
    with pytest.raises(ConfigError, match=text):
        say(8, 5)
    with pytest.raises(ConfigError, match=r"use --recompute full; --dry_run shows what the memory is used for"):
        say(8, 5, "--seq_len", 16384, "--batch_size", 1, "--num_layer", 11)
    with pytest.raises(ConfigError, match=r"use a smaller model or more processes; --dry_run"):
        say(2, 2)


def test_processes_of_one_machine_share_it() -> None:
    """Parameters and gradients of each, and more of what they exchange; one set of states."""
    needs = [float(say(640, 1, "--batch_size", 2, local=local)[0].split()[4]) for local in ("1", "2", "4")]
    assert 1.5 * needs[0] < needs[1] < 2 * needs[0]
    assert 1.5 * needs[1] < needs[2] < 2 * needs[1]


def test_a_container_may_have_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_of(CPU)
    assert whole is not None
    assert whole.total > whole.free > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory_of(CPU) is not None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    found = memory_of(CPU)
    assert found is not None
    assert found.total == whole.total
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory_of(CPU) == Memory(5000, 4000)
    (tmp_path / "memory.current").write_text("6000\n")
    assert memory_of(CPU) == Memory(5000, 0)


def test_where_nothing_tells_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine", lambda file: None)
    assert memory_of(CPU) is None
