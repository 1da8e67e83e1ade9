"""Our Triton kernels beside their eager twins and these compiled: time, rate, share of the ceilings, memory."""

from __future__ import annotations

import argparse
import gc
import importlib.util

import torch

from benchmarks import kernels
from gpu.part import Context, run
from gpu.stand_in import interpreter_problem
from tinytron.utils.profile import matmul_rates
from tinytron.utils.training import DTYPES

PRECISIONS = ("bf16", "fp32")
ROUNDS = 20


def ceilings(context: Context, precision: str) -> tuple[float, float]:
    """FLOP/s and bytes/s of this GPU, as the environment part measured them, or measured now."""
    rate = context.figure_of("environment", f"environment.{precision}_flops")
    bandwidth = context.figure_of("environment", "environment.copy_bytes_per_second")
    if rate is None:
        _, rate = matmul_rates(context.device, DTYPES[precision], 0.3, context.sizes.matmul)
    return rate, bandwidth or kernels.copy_rate(context.device, context.sizes.copy_bytes)


def main(context: Context, _: argparse.Namespace) -> None:
    """Measure every operation in both precisions and all widths; a kernel's gain is the smallest of its gains in the
    precision that training runs in (Muon's products: in fp32)."""
    if importlib.util.find_spec("triton") is None:
        context.leave_out("triton is missing: pip install triton")
    if context.rehearsing and (problem := interpreter_problem()):
        context.leave_out(problem)
    torch.manual_seed(0)
    gains: dict[str, list[float]] = {}
    sizes = context.sizes
    for precision in ("fp32",) if context.rehearsing else PRECISIONS:  # the interpreter has no bf16
        rate, bandwidth = ceilings(context, precision)
        for width in sizes.kernel_widths:
            lines = [f"### {precision}, width {width}", "", *kernels.HEAD.split("\n")]
            found = kernels.operations(
                context.device, DTYPES[precision], sizes.kernel_tokens, width, sizes.kernel_vocab
            )
            for op in found:
                measured = kernels.measure(op, rate, bandwidth, 1 if context.rehearsing else ROUNDS, context.device)
                lines.append(measured.row())
                context.result.figure(f"kernels.{op.key}.{precision}.{width}.gain", measured.gain)
                of_muon = op.key in ("gram", "polynomial", "orthogonalize")
                if precision == ("fp32" if of_muon else sizes.precision):
                    gains.setdefault(op.key, []).append(measured.gain)
                    context.result.figure(f"kernels.{op.key}.gain", min(gains[op.key]))
                del op
                gc.collect()
            context.result.table(lines)
    paying = [f"{key} {min(values):.2f}" for key, values in gains.items()]
    context.result.note(f"speed over the faster twin: {', '.join(paying)}")


if __name__ == "__main__":
    run(main, __doc__)
