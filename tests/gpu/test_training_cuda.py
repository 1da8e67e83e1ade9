"""Training on one GPU: equal to the CPU, to the naive twin, and to itself; 16 bits; and steps that wait for nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu.device import GPU_TEST, host_waits, no_host_waits, only_a_gpu_shows, relative_error, sized
from tests.gpu.trained import EXPERTS, SMALL, Outcome, Stepped, stepped, trained
from tests.helpers.parity import EXPERTS as TWIN_EXPERTS
from tests.helpers.parity import Case, differences, run_case
from tests.helpers.runs import config_of, read_logs, run_well
from tests.naive.training import Recipe

pytestmark = GPU_TEST
STEPS = sized(5, 2)
EXACT = ("--precision", "fp32", "--disable_tf32")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        f"{EXPERTS} --num_shared_experts 1 --moe_bias_update_rate 0.01",
        "--optimizer muon --muon_normuon",
        "--qk_norm --sliding_window 8 --sliding_window_layers 0 --bias --norm_type layer --z_loss_coef 0.001",
    ],
    ids=["dense", "experts", "muon", "options"],
)
def test_training_equals_the_cpu(flags: str, tmp_path: Path) -> None:
    mine, cpu = (
        trained(STEPS, tmp_path / backend, *EXACT, "--backend", backend, *flags.split()) for backend in ("auto", "gloo")
    )
    assert not (found := mine.differences(cpu, 1e-4, 1e-4, 1e-4)), "\n".join(found)
    assert len(mine.losses) == STEPS


TWINS: dict[str, Case] = {
    "dense": Case(1, accumulation=2, mask="uneven"),
    "experts": Case(1, accumulation=2, mask="uneven", experts=TWIN_EXPERTS, shared_experts=1, precision="fp64"),
    "muon": Case(1, recipe=Recipe(optimizer="muon", clip=0.3)),
    "dense fp64": Case(1, accumulation=2, precision="fp64", small_buckets=True),
}


@pytest.mark.parametrize("name", TWINS)
def test_training_equals_the_naive_twin(name: str, tmp_path: Path) -> None:
    """Every gradient of every step, too. Experts in fp64: rounding in fp32 may flip a near tie of the router."""
    case = dataclasses.replace(TWINS[name], tf32=False)
    found = differences(case, [run_case(case, tmp_path)], 1e-4 if case.precision == "fp32" else 1e-9)
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def exact_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What fp32 training on the CPU gives with some flags, computed once."""
    made: dict[str, Outcome] = {}

    def outcome(flags: str) -> Outcome:
        if flags not in made:
            log_dir = tmp_path_factory.mktemp("exact")
            made[flags] = trained(STEPS, log_dir, *EXACT, "--backend", "gloo", *flags.split())
        return made[flags]

    return outcome


@pytest.mark.parametrize(
    ("flags", "way", "weights"),
    [
        ("", "--precision bf16", 5e-2),
        ("", "--precision fp16", 2e-2),
        ("", "--precision fp32", 2e-2),
        ("", "--precision bf16 --attn_backend varlen", 5e-2),
        (EXPERTS, "--precision bf16", 0.3),  # a token that goes to another expert
    ],
    ids=["bf16", "fp16", "tf32", "varlen", "experts"],
)
def test_sixteen_bits_and_tf32_are_near_fp32(
    flags: str, way: str, weights: float, exact_outcomes: Callable[[str], Outcome], tmp_path: Path
) -> None:
    """Adam turns a gradient's rounding into a step of full size wherever the gradient is small: weights differ more."""
    mine = trained(STEPS, tmp_path, *flags.split(), *way.split())
    assert not (found := mine.differences(exact_outcomes(flags), 3e-3, 5e-2, weights)), "\n".join(found)


def _at_step(trainer: Stepped) -> list[float]:
    return [float(state["step"]) for state in trainer.raw_optimizer.state.values() if "step" in state]


def test_an_fp16_overflow_is_skipped_on_the_device(tmp_path: Path) -> None:
    """A step of four overflows: nothing changes but the scale, nobody waits, and training is fp32's without that step."""
    trainer = stepped(tmp_path, "--precision", "fp16", "--max_steps", 4).run(1)
    before, main = trainer.weights(), [piece.main.clone() for piece in trainer.optimizer.pieces()]
    scale = float(trainer.optimizer.loss_scale)
    skipped = float(trainer.optimizer.skipped_steps)
    assert skipped == 0
    batches = trainer.next_batches()
    trainer.optimizer.loss_scale.fill_(2.0**60)
    with no_host_waits():
        trainer.one_step(batches)
    assert float(trainer.optimizer.loss_scale) == 2.0**59
    assert float(trainer.optimizer.skipped_steps) == float(trainer.optimizer.last_skipped) == 1
    assert not torch.isfinite(trainer.kept[-1][1])
    assert _at_step(trainer) == [1.0] * len(_at_step(trainer))
    after = trainer.weights()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(torch.equal(p.main, was) for p, was in zip(trainer.optimizer.pieces(), main, strict=True))

    trainer.optimizer.loss_scale.fill_(scale / 64)  # another one: Adam would not see it if nothing were unscaled
    mine = trainer.run(2).outcome()
    assert float(trainer.optimizer.skipped_steps) == 1
    torch.distributed.destroy_process_group()

    exact = stepped(tmp_path / "exact", *EXACT, "--max_steps", 4).run(1)
    exact.next_batches()
    exact.step += 1
    theirs = exact.run(2).outcome()
    assert mine.losses[:1] + mine.losses[2:] == pytest.approx(theirs.losses, rel=3e-3)
    assert mine.norms[:1] + mine.norms[2:] == pytest.approx(theirs.norms, rel=5e-2)
    for name, weight in theirs.weights.items():
        assert relative_error(mine.weights[name], weight) < 2e-2, name


def test_the_fp16_scale_falls_until_it_fits(tmp_path: Path) -> None:
    trainer = stepped(tmp_path, "--precision", "fp16", "--max_steps", 40).run(1)
    trainer.optimizer.loss_scale.fill_(2.0**36)
    scales = []
    for _ in range(30):
        trainer.run(1)
        scales.append(float(trainer.optimizer.loss_scale))
        if not float(trainer.optimizer.last_skipped):
            break
    assert scales[:-1] == [2.0 ** (35 - i) for i in range(len(scales) - 1)]
    assert len(scales) > 2
    assert scales[-1] == scales[-2]
    assert all(torch.isfinite(weight).all() for weight in trainer.weights().values())


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16",
        "--precision bf16 --recompute full --z_loss_coef 0.001",
        "--precision fp16 --recompute selective",
        "--precision fp32 --spike_sigma 8 --spike_window 6",
        "--precision bf16 --optimizer muon --muon_normuon",
        "--precision bf16 --sliding_window 8 --qk_norm",
        "--precision bf16 --attn_backend varlen --sliding_window 8 --recompute selective",
        "--precision bf16 --no-use_distributed_optimizer",
    ],
)
def test_a_training_step_never_waits_for_the_host(flags: str, tmp_path: Path) -> None:
    trainer = stepped(tmp_path, "--max_steps", 4, *flags.split()).run(1)
    batches = trainer.next_batches()
    torch.cuda.synchronize()
    with no_host_waits():
        trainer.one_step(batches)
    assert torch.isfinite(trainer.kept[-1][0])


@pytest.mark.parametrize("flags", ["--precision bf16", "--precision bf16 --recompute full"])
def test_experts_wait_once_per_exchange(flags: str, tmp_path: Path) -> None:
    trainer = stepped(tmp_path, "--max_steps", 4, *EXPERTS.split(), *flags.split()).run(1)
    batches = trainer.next_batches()
    torch.cuda.synchronize()
    with host_waits() as waits:
        trainer.one_step(batches)
    assert len(waits) == 2 * len(batches), waits  # once in each of two layers


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16",
        f"--precision bf16 {EXPERTS} --dropout 0.1",
        "--precision bf16 --attn_backend varlen --sliding_window 8",
        "--precision fp32 --optimizer muon",
    ],
)
def test_two_deterministic_runs_are_bit_identical(flags: str, tmp_path: Path) -> None:
    first, second = (trained(3, tmp_path / name, "--deterministic", *flags.split()) for name in ("first", "second"))
    assert (first.losses, first.norms) == (second.losses, second.norms)
    assert all(torch.equal(second.weights[name], weight) for name, weight in first.weights.items())


def test_the_launcher_trains_on_the_gpu(tmp_path: Path) -> None:
    """A process group by torchrun's environment variables, and NCCL; validation and a save at the end."""
    flags = (*SMALL, "--log_dir", tmp_path, "--max_steps", 3, "--do_val", "--max_eval_tokens", 512, "--log_every", 1)
    config = config_of(*flags)
    only_a_gpu_shows("NCCL under the launcher; tests/cli/test_launch.py has it on the CPU")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    done = run_well(*flags, cwd=tmp_path, processes=1, env={"CUDA_VISIBLE_DEVICES": seen})
    assert "on 1 x cuda" in done.stdout
    (folder,) = (path.parent for path in tmp_path.glob("*/log.jsonl"))
    losses = [record["loss"] for record in read_logs(folder)[1] if "loss" in record and record.get("stage") != "val"]
    assert len(losses) == config.train.max_steps
    assert list(folder.glob("*_meta.pt"))
