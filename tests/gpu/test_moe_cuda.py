"""Experts on a CUDA device; run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinytron.kernels.grouped_gemm import grouped_linear, looped_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TINY = shlex.split(
    "--use_mock_data --mock_data_num_samples 64 --total_batch_size 2048 --batch_size 2 --seq_len 128 --num_layer 2 "
    "--num_attention_heads 8 --num_key_value_heads 4 --hidden_size 256 --vocab_size 512 --use_moe --num_experts 8 "
    "--num_experts_per_tok 2 --moe_intermediate_size 128"
)


def test_grouped_product_equals_one_product_per_expert() -> None:
    torch.manual_seed(0)
    counts = [100, 0, 31, 125]
    rows = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for out in (
        grouped_linear(rows, weight, torch.tensor(counts, device="cuda"), counts),
        looped_linear(rows, weight, counts),
    ):
        grads.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), (rows, weight))))
    for grouped, looped in zip(*grads, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=2e-2, atol=2e-1)
    assert not grads[0][2][1].any()  # the expert without rows


@pytest.mark.parametrize("flags", ["", "--optimizer muon", "--recompute full", "--precision fp32"])
def test_training_with_experts_runs(flags: str, tmp_path: Path) -> None:
    command = [sys.executable, "pretrain_debug.py", *TINY, "--log_dir", str(tmp_path), "--max_steps", "8"]
    subprocess.run([*command, *flags.split()], check=True, timeout=300)
    (log,) = tmp_path.glob("*/log.jsonl")
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 8
    assert all(5.5 < loss < 7.0 for loss in losses)  # ln 512 = 6.24
