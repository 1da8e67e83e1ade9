"""A readable report of a memory plan."""

from __future__ import annotations

from tinytron.distributed.layout import ParallelLayout
from tinytron.model import ModelConfig
from tinytron.planner.memory import MemoryPlan
from tinytron.planner.step import Workload
from tinytron.utils.model import count_parameters, train_flops_per_token
from tinytron.utils.texts import counted

_GIB = 2**30


def rows(plan: MemoryPlan) -> list[tuple[str, int, str]]:
    """The kinds of memory, each with its bytes and a remark. Their sum is the peak of forward and backward."""
    held, step = plan.held, plan.step
    layer = f"{max(step.layers) / 2**20:.1f} MiB in the largest block" if step.layers else ""
    return [
        ("parameters", held.parameters, "flat buffers, padding included"),
        ("gradients", held.gradients, "in flat buffers, too"),
        ("main weights", held.main, "this rank's shard"),
        ("optimizer states", held.optimizer, "this rank's shard"),
        ("exchange buffers", held.exchange, "gradients received from other ranks"),
        ("tables and batch", step.tables + step.batch + plan.library, "rotary angles, token ids, cuBLAS"),
        ("activations", step.activations, f"kept for the backward pass; {layer}"),
        ("loss", step.loss, "gradients that the head computes in the forward pass"),
        ("temporary", step.peak - step.activations - step.loss, f"at the peak, in the {step.peak_phase}"),
    ]


def table(plan: MemoryPlan) -> str:
    """The rows and their sum as a Markdown table."""
    lines = ["| memory of a rank | GiB | |", "|---|---:|---|"]
    lines += [f"| {kind} | {_gib(size)} | {remark} |" for kind, size, remark in rows(plan)]
    lines.append(f"| **forward and backward** | **{_gib(plan.moments['forward and backward'])}** | the sum |")
    return "\n".join(lines)


def describe(
    plan: MemoryPlan, config: ModelConfig, work: Workload, layout: ParallelLayout, device_memory: int | None = None
) -> str:
    """The table and other facts that are known before a run. ``device_memory`` is in bytes, or ``None`` if unknown."""
    count = count_parameters(config)
    flops = train_flops_per_token(config, work.seq_len)
    active = f", {count.active / 1e6:.2f}M of them active" if count.active != count.total else ""
    tokens = layout.dp * work.micro_batches * work.batch_size * work.seq_len
    experts = f", experts shared by {layout.ep} and used evenly" if config.use_moe else ""
    others = ", ".join(f"{name} {_gib(size)}" for name, size in list(plan.moments.items())[1:])
    micro_batches = counted(work.micro_batches, "micro-batch", "micro-batches")
    lines = [
        f"{count.total / 1e6:.2f}M parameters{active} | {flops / 1e9:.3f} GFLOP per token",
        f"{layout.world_size} x {work.device} = dp {layout.dp} x sep {layout.sep}{experts} | "
        f"{tokens:,} tokens per step: {micro_batches} of {work.batch_size} x {work.seq_len} each",
        "",
        table(plan),
        "",
        f"other moments: {others} GiB",
        f"peak: {_gib(plan.peak)} GiB on rank {plan.held.rank}{_verdict(plan.peak, device_memory)}",
        f"host memory of rank 0 while a checkpoint is written: {_gib(plan.host)} GiB",
        f"checkpoint on disk: {_gib(plan.disk)} GiB",
        "not counted: the device's own context, NCCL, fragmentation; --use_compile usually keeps less than this",
    ]
    return "\n".join(lines)


def _verdict(peak: int, device_memory: int | None) -> str:
    if device_memory is None:
        return ""
    fits = "fits into" if peak < device_memory else "does NOT fit into"
    return f": {fits} the {_gib(device_memory)} GiB of this device"


def _gib(size: int) -> str:
    """``size`` in GiB, with three decimals below 100 GiB."""
    return f"{size / _GIB:.3f}" if size < 100 * _GIB else f"{size / _GIB:.1f}"
