"""The operations of a training step against their floors, and the ways to attend, with and without documents."""

from __future__ import annotations

import argparse

import torch
from step_time import model_config

from benchmarks import operations
from gpu.kernels import ceilings
from gpu.part import Context, run
from tinytron.utils.training import DTYPES

ROUNDS = 15


def main(context: Context, _: argparse.Namespace) -> None:
    """Measure the operations of the dense model with heads of 128, attention first."""
    sizes = context.sizes
    name, batch = sizes.models["dense128"]
    config = model_config(name, sizes.seq_len)
    case = operations.Case(config, batch, sizes.seq_len, DTYPES[sizes.precision], context.device)
    rounds = 2 if context.rehearsing else ROUNDS
    torch.manual_seed(0)
    plain, packed, notes = operations.attention_times(case, rounds)
    for kind, times in (("plain", plain), ("documents", packed)):
        for backend, milliseconds in times.items():
            context.result.figure(f"operations.attention.{kind}.{backend}", milliseconds)
    context.result.table([*operations.ATTENTION_HEAD.split("\n"), *operations.attention_rows(plain, packed)])
    for note in notes:
        context.result.note(f"not here: {note}")
    rate, bandwidth = ceilings(context, sizes.precision)
    rows = [*operations.OPERATIONS_HEAD.split("\n"), *operations.operation_rows(case, rate, bandwidth, rounds)]
    context.result.table(rows)
    context.result.note(f"{name}, {batch} x {sizes.seq_len} tokens: forward and backward of each operation")


if __name__ == "__main__":
    run(main, __doc__)
