"""What a plan says beside what was measured: layouts that no laptop has, GPUs, and the text for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.runs import TINY, config_of
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.kernels.choice import Backend
from tinytron.model import ModelConfig
from tinytron.planner.report import describe, rows
from tinytron.planner.step import StepMemory, Workload, meta_model, step_memory
from tinytron.training.dry_run import dry_run, plan_run

EXPERTS = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 12)
SIZES: dict[str, Any] = {
    **{"block_size": 64, "vocab_size": 512, "num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"hidden_size": 64, "intermediate_size": 128},
}


def test_states_are_sharded_over_a_world_of_any_size() -> None:
    flags = (*TINY, "--precision", "bf16", "--total_batch_size", 12 * 1024, "--batch_size", 1)
    one, many = (plan_run(config_of(*flags), world)[0] for world in (1, 1024))
    elements = one.held.parameters // 2
    assert one.held.main == 4 * elements
    # Of each of two buffers every rank owns 128 elements at least: 256 bytes of bf16.
    assert many.held.main == 4 * 2 * 128
    assert many.held.optimizer == 2 * many.held.main + 2 * 4
    assert (many.step.layers, many.step.peak) == (one.step.layers, one.step.peak)
    assert one.step.batch == 1024 * many.step.batch
    assert many.disk == one.disk


def test_experts_are_spread_over_their_group() -> None:
    flags = (*TINY, *EXPERTS, "--total_batch_size", 12 * 16, "--batch_size", 1)
    spread, whole = (plan_run(config_of(*flags, "--ep_size", size), 8)[0] for size in (4, 1))
    experts = 2 * 4 * 3 * 16 * 12 * 4  # layers, experts, matrices, bytes
    padding = 8 * 128 * 4  # at most, of a buffer
    assert whole.held.parameters - spread.held.parameters == pytest.approx(experts * 3 // 4, abs=padding)
    assert spread.disk == whole.disk


def _step(model: dict[str, Any] | None = None, **work: Any) -> StepMemory:
    config = ModelConfig(**{**SIZES, **(model or {})})
    plan = Workload(**{"dtype": torch.bfloat16, "batch_size": 2, "seq_len": 64, "device": "cuda", **work})
    return step_memory(meta_model(config, plan, ParallelLayout(1)), plan, ParallelLayout(1))


def test_on_a_gpu_the_loss_has_all_logits_of_a_small_batch_at_once() -> None:
    gpu, cpu = _step(), _step(device="cpu", seq_len=64, batch_size=2)
    assert gpu.peak_phase == cpu.peak_phase == "loss"
    tokens = 128
    weight, logits = 512 * 64, tokens * 512
    # Logits in bf16 and fp32, the weight's gradient in fp32 and a chunk's part of it.
    assert gpu.peak - gpu.activations >= logits * 6 + weight * (4 + 2)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_flash_attention_needs_no_masks(backend: Backend) -> None:
    mask = 2 * 64 * 64 * 2
    # With a mask torch wants keys and values for each of the 4 query heads, without one it keeps those of 2, which for
    # the keys are part of what the rotation made anyway; in 2 layers.
    repeated = 2 * (2 * 4 - 2) * (2 * 64 * 16 * 2)
    masked, flash = _step(documents=True), _step(documents=True, attn_backend=backend)
    assert masked.activations - flash.activations == pytest.approx(mask + repeated, rel=0.01)
    window = {"sliding_window": 8}
    masked, flash = _step(window), _step(window, attn_backend=backend)
    assert masked.activations - flash.activations == pytest.approx(64 * 64 * 2 + repeated, rel=0.01)
    assert _step(attn_backend=backend) == _step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_precision_has_a_plan_on_a_gpu(dtype: torch.dtype, recompute: str) -> None:
    for model in ({}, {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "dropout": 0.1}):
        step = _step(model, dtype=dtype, recompute=recompute)
        assert step.peak >= step.activations + step.loss > 0
        assert len(step.layers) == 2


def test_what_fills_up_a_row_of_experts_tokens_is_marked() -> None:
    """A byte a token, in each of the two micro-batches."""
    flags = (*TINY, *EXPERTS, "--batch_size", 2, "--total_batch_size", 48)
    packed, plain = (plan_run(config_of(*flags, *more), 1)[0].step for more in (("--packing", "best_fit"), ()))
    assert packed.batch - plain.batch == 48
    dense = (plan_run(config_of(*TINY, *more), 1)[0].step for more in (("--packing", "best_fit"), ()))
    assert len({step.batch for step in dense}) == 1


def test_plain_scores_cost_more_than_a_kernel() -> None:
    scores = 2 * 4 * 64 * 64 * 4
    assert _step(attn_backend="math").activations > _step().activations + 2 * scores


def test_the_rows_add_up_and_the_text_names_what_counts() -> None:
    config = config_of(*TINY, *EXPERTS, "--backend", "nccl", "--total_batch_size", 192, "--ep_size", 2, "--sep_size", 2)
    plan, work, layout = plan_run(config, 4)
    assert sum(size for _, size, _ in rows(plan)) == plan.moments["forward and backward"]
    text = describe(plan, config.model, work, layout, device_memory=2**30)
    for part in (
        "4 x cuda = dp 2 x sep 2, experts shared by 2 and used evenly | 192 tokens per step: 4 micro-batches of 2 x 12",
        "of them active",
        "| optimizer states | 0.000 | this rank's shard |",
        "fits into the 1.000 GiB of this device",
        "checkpoint on disk: 0.000 GiB",
    ):
        assert part in text
    assert "does NOT fit into the 0.000 GiB of this device" in describe(plan, config.model, work, layout, 1000)
    assert "of this device" not in describe(plan, config.model, work, layout)


def test_a_dry_run_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    dry_run(config_of(*TINY, "--no-use_mock_data", "--dataset_path", "nowhere", "--dry_run"))
    assert re.search(r"^peak: 0.0\d\d GiB on rank 0$", capsys.readouterr().out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_launchers_world_is_planned_on_its_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, says in (("0", "2 x cpu = dp 2"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        dry_run(config_of(*TINY, "--dry_run"))
        printed = capsys.readouterr().out
        assert says in printed if says else printed == ""


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ("--dry_run_world_size", 3, "--sep_size", 2),
            "--sep_size 2 must divide the number of processes, 3; use one of",
        ),
        (("--dry_run_world_size", 5), "--total_batch_size 96 (tokens) must be a multiple of --batch_size x --seq_len"),
        (("--attn_backend", "flash", "--backend", "gloo"), "--attn_backend flash"),
        (
            ("--attn_backend", "varlen", "--backend", "gloo", "--head_dim", 8, "--precision", "bf16"),
            "--attn_backend varlen runs only on CUDA",
        ),
    ],
)
def test_what_the_run_refuses_the_dry_run_refuses(flags: tuple[object, ...], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dry_run(config_of(*TINY, "--dry_run", *flags))
    assert str(caught.value).startswith(text)
