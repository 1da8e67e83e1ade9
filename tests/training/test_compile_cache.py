"""``--use_compile`` in a second process finds what the first compiled: nothing in the model keeps torch from caching."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, TINY

# Long enough for attention by tiles.
LONGER: tuple[object, ...] = ("--seq_len", 32, "--block_size", 32, "--total_batch_size", 64, "--max_steps", 2)
EXPERTS = "--use_moe --num_experts 4 --num_experts_per_tok 2 --moe_intermediate_size 24"
RUN = """
import json, sys
from torch._dynamo.utils import counters
from tinytron.training import Trainer, build_config, parse_args
Trainer(build_config(parse_args(sys.argv[1:]))).train()
print(json.dumps([counters["inductor"], counters["aot_autograd"]]))
"""


def counted(cache: Path, log_dir: Path, *flags: object) -> tuple[dict[str, int], dict[str, int]]:
    """What torch counted while a process trained two steps: of compiled graphs, and of their backward passes' traces."""
    given = [str(flag) for flag in (*TINY, *LONGER, "--use_compile", "--debug", "--log_dir", log_dir, *flags)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *given], cwd=ROOT, check=True, timeout=600, capture_output=True, text=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert "context_fn" not in done.stderr  # torch's advice to whom wrote the model, on every rank
    compiled, traced = json.loads(done.stdout.splitlines()[-1])
    return compiled, traced


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--qk_norm --recompute selective", EXPERTS])
def test_a_second_process_compiles_nothing(tmp_path: Path, flags: str) -> None:
    given = ("--precision", "bf16", *flags.split())
    (first, _), (second, traced) = (counted(tmp_path / "cache", tmp_path / name, *given) for name in ("one", "two"))
    assert first["fxgraph_cache_miss"] > 0
    assert second["fxgraph_cache_hit"] >= first["fxgraph_cache_miss"]
    assert not {name for name in second if name in ("fxgraph_cache_miss", "fxgraph_cache_bypass")}
    # The weighted sum of experts is a Function (plain formulas would add atomically): its backward is traced again.
    assert traced["autograd_cache_hit"] == traced["total"] - ("--use_moe" in given)
