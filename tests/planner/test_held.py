"""What a rank holds between steps, and saves: the plan against real optimizers and checkpoints, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tests.planner.measure import held_bytes, measured_start
from tinytron.training.dry_run import plan_run

Pools = Callable[[int], Ranks]

EXPERTS = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 12)
MUON = ("--optimizer", "muon")
SMALL_BUCKETS = ("--bucket_size_mb", 0.004)
HELD: dict[str, tuple[int, tuple[object, ...]]] = {
    "one process": (1, ()),
    "one process, bf16": (1, ("--precision", "bf16")),
    "two": (2, ("--precision", "bf16")),
    "two, fp32, small buckets": (2, SMALL_BUCKETS),
    "two, untied, biases": (2, ("--no-tied_lm_head", "--bias", "--precision", "bf16")),
    "averaged": (2, ("--ema_decay", 0.9, "--precision", "bf16")),
    "averaged, muon": (2, ("--ema_decay", 0.9, *MUON, "--muon_normuon", *SMALL_BUCKETS)),
    "replicated": (2, ("--no-use_distributed_optimizer", "--precision", "bf16")),
    "short wire": (2, ("--grad_reduce_dtype", "bf16")),
    "muon": (2, (*MUON, "--precision", "bf16", *SMALL_BUCKETS)),
    "normuon": (1, (*MUON, "--muon_normuon")),
    "muon, replicated": (2, (*MUON, "--no-use_distributed_optimizer")),
    "experts": (2, (*EXPERTS, "--ep_size", 2, "--precision", "bf16")),
    "experts of each": (2, (*EXPERTS, "--ep_size", 1)),
    "experts, muon": (2, (*EXPERTS, *MUON, "--muon_normuon", "--ep_size", 2, "--precision", "bf16")),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_is_exact(ranks: Pools, tmp_path: Path, name: str) -> None:
    world, flags = HELD[name]
    flags = (*TINY, "--max_steps", 2, *flags)  # the last of two values counts
    found = ranks(world).run(held_bytes, tmp_path, *flags)
    plan, _, _ = plan_run(config_of(*flags), world)
    held = plan.held
    for kind in ("parameters", "gradients", "main", "exchange"):
        assert [rank[kind] for rank in found] == [getattr(held, kind)] * world, kind
    assert max(rank["optimizer"] for rank in found) == found[held.rank]["optimizer"] == held.optimizer
    assert plan.step.tables == found[0]["tables"]
    # Of the checkpoint: what the first rank has in host memory, and what all write.
    assert plan.weights == found[0]["weights"]
    assert plan.host == found[0]["host"]
    once = found if "replicated" not in name else found[:1]
    assert plan.disk == found[0]["weights"] + sum(rank["states"] for rank in once)


@pytest.mark.parametrize("name", ["one process, bf16", "two", "normuon", "experts"])
def test_the_fullest_moment_of_the_start_is_known(ranks: Pools, tmp_path: Path, name: str) -> None:
    world, flags = HELD[name]
    flags = (*TINY, "--hidden_size", 256, *flags)
    found = ranks(world).run(measured_start, tmp_path, *flags)
    plan, _, _ = plan_run(config_of(*flags), world)
    assert max(found) == pytest.approx(plan.moments["start-up"], rel=0.01)
