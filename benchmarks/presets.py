"""The memory of every preset on GPUs as a Markdown table, predicted; nothing is run or allocated.

python benchmarks/presets.py [--presets gpt_1b gpt_7b ...] [--world_sizes 1 8 64]

The flags are those that scripts/<preset>/pretrain.sh gives, with its default batch. Tokens/s are what all GPUs together
would reach at 40 % of an H100's or H200's data sheet: arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tinytron.planner.memory import MemoryPlan
from tinytron.training import Config
from tinytron.training.config import SECTIONS
from tinytron.training.dry_run import plan_run
from tinytron.utils.model import count_parameters, train_flops_per_token
from tinytron.utils.profile import PEAK_TFLOPS

ROOT = Path(__file__).parents[1]
PRESETS = ("debug_gpt_0.25b", "debug_gpt_0.3b_a0.17b", "gpt_1b", "gpt_1b_modern", "gpt_3b", "gpt_7b")
MFU = 0.4
GIB = 2**30
CARDS = {"80 GB": 80e9, "141 GB": 141e9}  # bytes; the cards' own context, NCCL and fragmentation need some of it


def config_of(preset: str) -> Config:
    """The configuration that the preset's script makes, for GPUs. Raises: CalledProcessError if the script fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the scripts take the active python
    printed = subprocess.run(
        ["bash", f"scripts/{preset}/pretrain.sh", "--backend", "nccl", "--print_config"],
        cwd=ROOT,
        env={**os.environ, "NUM_GPUS": "0", "NPROC": "1", "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    shown = json.loads(printed)
    sections: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in shown[name].items()}
        sections[name] = cls(**values)
    return Config(**sections)


def row(preset: str, config: Config, world_size: int) -> str:
    """One line of the table."""
    plan, work, _ = plan_run(config, world_size)
    count = count_parameters(config.model)
    millions = f"{count.total / 1e6:,.0f}M"
    if count.active != count.total:
        millions += f" ({count.active / 1e6:,.0f}M active)"
    flops = train_flops_per_token(config.model, config.train.seq_len)
    rate = MFU * PEAK_TFLOPS["H100"][1] * 1e12 * world_size / flops
    cells = [preset, millions, str(world_size), f"{work.batch_size} x {work.seq_len}", work.recompute]
    cells += [f"{size / GIB:.1f}" for size in _kinds(plan)]
    cells += ["yes" if plan.peak < size else "no" for size in CARDS.values()]
    return f"| {' | '.join([*cells, f'{rate:,.0f}'])} |"


def _kinds(plan: MemoryPlan) -> list[int]:
    held, step = plan.held, plan.step
    rest = plan.peak - held.total - step.activations
    if plan.moments["forward and backward"] < plan.peak:
        rest = plan.moments["forward and backward"] - held.total - step.activations
    states = held.main + held.optimizer
    return [held.parameters, held.gradients, states, step.activations, rest, plan.peak]


def table(presets: list[str], world_sizes: list[int]) -> str:
    """All of it."""
    head = ["preset", "parameters", "GPUs", "micro-batch", "recompute", "parameters", "gradients", "main + states"]
    head += ["activations", "rest", "**peak**", *CARDS, f"tokens/s at {MFU:.0%} MFU"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---|---|" + "---:|" * 6 + "---|" * len(CARDS) + "---:|"]
    for preset in presets:
        config = config_of(preset)
        lines += [row(preset, config, size) for size in world_sizes]
    return "\n".join(lines)


def main() -> None:
    """Flags -> table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--world_sizes", nargs="+", type=int, default=[1, 8, 64])
    args = parser.parse_args()
    print(table(args.presets, args.world_sizes))


if __name__ == "__main__":
    main()
