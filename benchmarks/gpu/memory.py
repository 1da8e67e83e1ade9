"""The plan of ``--dry_run`` next to what a GPU's allocator saw: memory held between steps, and the peak."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch
import torch.distributed as dist

from gpu.part import Context, run
from gpu.sizes import Sizes
from tinytron.errors import ConfigError, first_line
from tinytron.training import Trainer, build_config, parse_args
from tinytron.training.dry_run import plan_run

STEPS = 3
CASES: dict[str, tuple[object, ...]] = {
    "dense": (),
    "experts": ("--use_moe", "--num_experts", 8, "--num_experts_per_tok", 2, "--moe_intermediate_size", 768),
    "recompute selective": ("--recompute", "selective"),
    "recompute full": ("--recompute", "full"),
    "heads of 128": ("--head_dim", 128, "--num_attention_heads", 8, "--qk_norm"),
    "Muon": ("--optimizer", "muon"),
    "varlen": ("--attn_backend", "varlen", "--sliding_window", 100),
}
REHEARSED = ("dense",)
# Layers, width, feed-forward width and sequences of a micro-batch by the name of the sizes.
MODELS = {
    "full": (12, 1024, 4096, 4), "medium": (12, 1024, 4096, 1), "small": (6, 512, 2048, 1), "toy": (2, 64, 128, 2)
}  # fmt: skip


def flags_of(case: Sequence[object], sizes: Sizes, log_dir: object) -> list[str]:
    """The command line of a case: about 0.25B parameters, fewer where memory is short."""
    layers, width, inner, batch = MODELS[sizes.name]
    heads = max(2, width // 32)
    settings: dict[str, object] = {
        "num_layer": layers, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8), "vocab_size": sizes.kernel_vocab, "seq_len": sizes.seq_len,
        "block_size": sizes.seq_len, "batch_size": batch, "total_batch_size": batch * sizes.seq_len,
        "precision": sizes.precision, "log_dir": log_dir, "max_steps": STEPS,
        "mock_data_num_samples": 4 * batch * STEPS,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return [str(word) for word in ("--debug", "--use_mock_data", *words, *case)]


def measured(flags: Sequence[str]) -> tuple[int, int]:
    """Bytes held after the steps, and the peak since before the model was built, of a run in this process."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # of the case before
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(build_config(parse_args(list(flags))))
    try:
        trainer.train()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    finally:
        del trainer
        dist.destroy_process_group()


def main(context: Context, _: argparse.Namespace) -> None:
    """Plan and measure every case; the worst distance is what counts."""
    lines = ["| case | held, MiB | planned | peak, MiB | planned | distance |", "|---|---:|---:|---:|---:|---:|"]
    worst = 0.0
    for name in REHEARSED if context.rehearsing else CASES:
        flags = flags_of(CASES[name], context.sizes, context.out / "log")
        try:
            held, peak = measured(flags)
            plan, _work, _layout = plan_run(build_config(parse_args(flags)), 1)
        except ConfigError as error:  # it cannot run on this GPU
            context.result.note(f"left out: {name} ({error})")
            continue
        except Exception as error:
            context.result.check(name, first_line(error))
            continue
        context.result.check(name)
        distance = (
            max(abs(plan.resident / held - 1), abs(plan.peak / peak - 1)) if held > 0 and peak > 0 else float("nan")
        )
        worst = worst if distance <= worst else distance  # a NaN stays
        shown = [f"{size / 2**20:,.0f}" for size in (held, plan.resident, peak, plan.peak)]
        lines.append(f"| {name} | {' | '.join(shown)} | {distance:.1%} |")
        context.result.figure("memory.worst_error", worst)
        context.result.figure(f"memory.{name.replace(' ', '_')}.peak_bytes", peak)
    context.result.table(lines)
    context.result.note(f"the plan is within {worst:.1%} of {len(lines) - 2} measured runs")
    if len(lines) == 2 or any(context.result.problems.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, __doc__)
