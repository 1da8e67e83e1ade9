"""The plan of a run against a GPU's allocator."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers.runs import ROOT, config_of
from tinytron.training.dry_run import plan_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

QUARTER: tuple[object, ...] = (
    *("--num_layer", 12, "--num_attention_heads", 32, "--num_key_value_heads", 4, "--hidden_size", 1024),
    *("--intermediate_size", 4096, "--batch_size", 4, "--total_batch_size", 4 * 4096, "--debug", "--max_steps", 4),
    *("--use_mock_data", "--mock_data_num_samples", 64),
)
# In a process of its own: the allocator has seen nothing else.
MEASURE = """
import json, sys, torch
from tinytron.training import Trainer, build_config, parse_args
trainer = Trainer(build_config(parse_args(sys.argv[1:])))
steps = trainer.data.steps(trainer.step)
for _ in range(2):
    trainer.train_step(next(steps))
torch.cuda.synchronize()
held = torch.cuda.memory_allocated()
trainer.train_step(next(steps))
torch.cuda.synchronize()
print(json.dumps([held, torch.cuda.max_memory_allocated()]))
"""


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--recompute", "selective"),
        ("--recompute", "full"),
        ("--head_dim", 128, "--num_attention_heads", 8, "--qk_norm"),
        ("--optimizer", "muon"),
        ("--attn_backend", "varlen", "--sliding_window", 1000),
        ("--precision", "fp32", "--batch_size", 1, "--num_key_value_heads", 32),
        ("--use_moe", "--num_experts", 8, "--num_experts_per_tok", 2, "--moe_intermediate_size", 768),
    ],
    ids=str,
)
def test_the_peak_is_within_five_percent(flags: tuple[object, ...], tmp_path: object) -> None:
    options = [str(flag) for flag in (*QUARTER, *flags, "--log_dir", tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    held, peak = json.loads(done.stdout.splitlines()[-1])
    plan, _, _ = plan_run(config_of(*options), 1)
    assert plan.resident == pytest.approx(held, rel=0.05)
    assert plan.peak == pytest.approx(peak, rel=0.05)
