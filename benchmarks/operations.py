"""The operations of a training step, one by one: what each has to compute and to move, the least time that takes here, and
the time it takes, beside what torch offers instead.

python benchmarks/operations.py [--precision bf16 fp32] [--threads 2] [--batch 4] [--seq_len 512] [--rounds 15]

Forward and backward together, for the shapes of the 10M model of step_time.py. Floor: the larger of FLOPs over the measured
rate of matrix products, and of bytes (every input, output and gradient once, no intermediate) over the measured rate of
copies. A figure is the median over rounds in which the alternatives take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tinytron.kernels.tiled_attention import tiled_attention
from tinytron.model.modules.attn import attend
from tinytron.model.modules.emb import RotaryEmbedding, rotate
from tinytron.model.modules.loss import fused_linear_cross_entropy
from tinytron.model.modules.mlp import gated
from tinytron.model.modules.norm import RMSNorm
from tinytron.utils.matmul import onednn_keeps_fp32, use_onednn
from tinytron.utils.profile import measured_matmul_rate
from tinytron.utils.training import DTYPES

D, N, K, H, INNER, V = 256, 4, 2, 64, 704, 8192


@dataclass
class Operation:
    """One row: what is computed and moved, ours, and what it replaces (``None``: torch's own is used)."""

    name: str
    flops: float
    elements: float
    run: Callable[[], object]
    other_name: str = ""
    other: Callable[[], object] | None = None


def differentiated(f: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of ``f``; the gradient is random."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    grad = torch.randn_like(f(*inputs).detach())
    return lambda: torch.autograd.grad(f(*inputs), inputs, grad)


def operations(B: int, S: int, dtype: torch.dtype) -> Iterator[Operation]:
    """Those of a block, then those outside. ``B`` sequences of ``S`` tokens."""
    T = B * S

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    products = {"query, key, value": (D, (N + 2 * K) * H), "attention out": (N * H, D)}
    for name, (n_in, n_out) in {**products, "gate, up": (D, 2 * INNER), "down": (INNER, D)}.items():
        moved = 2 * (T * (n_in + n_out) + n_in * n_out) + T * n_out
        yield Operation(name, 6 * T * n_in * n_out, moved, differentiated(F.linear, new(T, n_in), new(n_out, n_in)))
    q, k, v = new(B, S, N, H), new(B, S, K, H), new(B, S, K, H)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, backend="sdpa")

    scores = B * N * S * (S + 1) / 2
    yield Operation(
        "attention", 7 * 2 * scores * H, 5 * q.numel() + 6 * k.numel(),
        differentiated(tiled_attention, q, k, v), "SDPA", differentiated(sdpa, q, k, v),
    )  # fmt: skip
    norm = RMSNorm(D, 1e-5).to(dtype)
    yield Operation(
        "RMSNorm", 0, 5 * T * D, differentiated(norm, new(B, S, D)),
        "F.rms_norm", differentiated(lambda x: F.rms_norm(x, (D,), norm.weight, 1e-5), new(B, S, D)),
    )  # fmt: skip

    def plain_gate(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    yield Operation(
        "silu(gate) * up", 0, 8 * T * INNER, differentiated(gated, new(T, 2 * INNER)),
        "torch", differentiated(plain_gate, new(T, 2 * INNER)),
    )  # fmt: skip
    rotation = RotaryEmbedding(10000.0 ** -(torch.arange(0, H, 2) / H), S, torch.float32, 1.0)(0, S)
    heads = new(B, S, N + K, H)
    yield Operation("rotation", 0, 4 * heads.numel(), differentiated(lambda x: rotate(x, rotation), heads))
    hidden, weight, labels = new(T, D), new(V, D), torch.randint(V, (T,))
    yield Operation(
        "head and loss", 6 * T * D * V, 2 * (T * D + V * D),
        differentiated(lambda x, w: fused_linear_cross_entropy(x, w, labels).objective, hidden, weight),
        "logits, cross_entropy", differentiated(lambda x, w: F.cross_entropy((x @ w.t()).float(), labels), hidden, weight),
    )  # fmt: skip


def median_ms(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Milliseconds of each, by turns."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 2):
        for run, seen in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if number >= 2:  # the first ones warm up
                seen.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(seen) for seen in times]


def copy_rate() -> float:
    """Bytes per second, read and written."""
    a, b = torch.ones(2, 2**25)
    return 2 * a.nbytes / (median_ms([lambda: b.copy_(a)], 15)[0] / 1e3)


def main() -> None:
    """Print one table per precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    for name, default in (("threads", torch.get_num_threads()), ("batch", 4), ("seq_len", 512), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if onednn_keeps_fp32():
        use_onednn()
    bandwidth = copy_rate()
    for precision in args.precision:
        dtype = DTYPES[precision]
        rate = measured_matmul_rate(torch.device("cpu"), dtype)
        print(
            f"\n{precision}, {args.batch} x {args.seq_len} tokens, {args.threads} threads, torch {torch.__version__}: "
            f"matrix products {rate / 1e9:.0f} GFLOP/s, copies {bandwidth / 1e9:.0f} GB/s\n\n"
            "| operation | GFLOP | MiB | floor, ms | ms | of the floor | instead of | ms | ratio |\n"
            "|---|---:|---:|---:|---:|---:|---|---:|---:|"
        )
        for op in operations(args.batch, args.seq_len, dtype):
            found = median_ms([op.run, *([op.other] if op.other else [])], args.rounds)
            moved = op.elements * dtype.itemsize
            floor = 1e3 * max(op.flops / rate, moved / bandwidth)
            peer = f"{op.other_name} | {found[1]:.2f} | {found[1] / found[0]:.2f}" if op.other else "| |"
            print(
                f"| {op.name} | {op.flops / 1e9:.2f} | {moved / 2**20:.1f} | {floor:.2f} | {found[0]:.2f} | "
                f"{floor / found[0]:.0%} | {peer} |"
            )


if __name__ == "__main__":
    main()
