"""Our Triton kernels beside their eager twins and the twins compiled: the figures that say whether a kernel pays.

python benchmarks/kernels.py [--precision bf16 fp32] [--width 768 2048] [--tokens 16384] [--rounds 20]     (a CUDA device)

Floor: the larger of FLOPs over the measured rate of matrix products (fp32 in TF32, as in training), and of bytes (every
input, output and gradient once) over the measured rate of copies; symmetric products need half the FLOPs of plain ones. A
figure is the median over rounds in which the variants take turns; memory is what a variant allocates beside its inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rounds import copy_rate, median_ms

from tinytron.distributed.expert_parallel import comm
from tinytron.kernels.choice import LossKernel, TritonKernel
from tinytron.kernels.cross_entropy import cross_entropy_ as eager_cross_entropy_
from tinytron.kernels.expert_rows import weighted_sum
from tinytron.model.modules.loss import fused_linear_cross_entropy
from tinytron.optim.muon import orthogonalize
from tinytron.utils.profile import measured_matmul_rate
from tinytron.utils.sequences import IGNORE_INDEX
from tinytron.utils.training import DTYPES

EXPERTS, TOP_K = 32, 4


@dataclass
class Operation:
    """One row: what has to be computed and moved, and the ways to do it; ``None``: not measured that way. ``key`` is a name
    for programs."""

    key: str
    name: str
    flops: float
    moved: float  # bytes
    eager: Callable[[], object]
    compiled: Callable[[], object] | None
    triton: Callable[[], object]


def loss_operations(device: torch.device, dtype: torch.dtype, tokens: int, D: int, V: int) -> Iterator[Operation]:
    """What is between the two products of the loss for one chunk, and the whole loss with its gradients."""
    from tinytron.kernels.cross_entropy_triton import cross_entropy_

    t = max(1, min(tokens, 2**27 // V))
    products, label_t = torch.randn(t, V, device=device).to(dtype), torch.randint(V, (t,), device=device)
    nll_t, counted_t = torch.empty(t, device=device), torch.ones(t, device=device)

    def twin(products: torch.Tensor) -> torch.Tensor:
        # Where they are in fp32 already, in place.
        z_tV = products.to(torch.float32)
        lse_t = eager_cross_entropy_(z_tV, label_t, counted_t, nll_t, 1e-4, ignore_index=IGNORE_INDEX, gradient=True)
        if z_tV is not products:
            products.copy_(z_tV)
        return lse_t

    def kernel() -> object:
        return cross_entropy_(products, label_t, counted_t, nll_t, 1e-4, ignore_index=IGNORE_INDEX, gradient=True)

    moved = 2 * products.numel() * dtype.itemsize
    fused = torch.compile(twin, dynamic=False)
    yield Operation(
        "loss_rows", f"rows of the loss, {t} x {V}", 0, moved, lambda: twin(products), lambda: fused(products), kernel
    )  # fmt: skip
    hidden, weight = (
        torch.randn(tokens, D, device=device).to(dtype),
        torch.randn(V, D, device=device).to(dtype) / D**0.5,
    )
    labels, inputs = torch.randint(V, (tokens,), device=device), (hidden.requires_grad_(), weight.requires_grad_())

    def whole(by: LossKernel) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fused_linear_cross_entropy(*inputs, labels, by=by).objective, inputs)

    moved = 2 * (hidden.nbytes + weight.nbytes)
    yield Operation(
        "head_and_loss",
        f"head and loss, {tokens} x {D}",
        6 * tokens * D * V,
        moved,
        whole("torch"),
        None,
        whole("triton"),
    )


def expert_operations(device: torch.device, dtype: torch.dtype, tokens: int, D: int) -> Iterator[Operation]:
    """Forward and backward of dispatch and of combine on one rank."""
    routes = comm.plan_dispatch(torch.rand(tokens, EXPERTS, device=device).topk(TOP_K).indices, EXPERTS, None)
    x = torch.randn(tokens, D, device=device).to(dtype).requires_grad_()
    rows = torch.randn(tokens * TOP_K, D, device=device).to(dtype).requires_grad_()
    weight = torch.rand(tokens, TOP_K, device=device).requires_grad_()
    grad_x, grad_rows = torch.randn_like(x), torch.randn_like(rows)

    def dispatch(x: torch.Tensor, by: TritonKernel) -> torch.Tensor:
        return comm.dispatch(x, routes, None, by).wait()

    def combine(rows: torch.Tensor, weight: torch.Tensor, by: TritonKernel) -> torch.Tensor:
        return weighted_sum(rows, weight, routes.order_R, routes.inverse_R, by)

    def dispatched(function: Callable[..., torch.Tensor], by: TritonKernel) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, by), x, grad_rows)

    def combined(function: Callable[..., torch.Tensor], by: TritonKernel) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(rows, weight, by), (rows, weight), grad_x)

    shape = f"{tokens} x {TOP_K} x {D}"
    compiled_dispatch, compiled_combine = (torch.compile(f, dynamic=False) for f in (dispatch, combine))
    yield Operation(
        "dispatch", f"dispatch, {shape}", 0, 2 * (x.nbytes + rows.nbytes), dispatched(dispatch, "torch"),
        dispatched(compiled_dispatch, "torch"), dispatched(dispatch, "triton"),
    )  # fmt: skip
    yield Operation(
        "combine", f"combine, {shape}", 0, 2 * x.nbytes + 3 * rows.nbytes, combined(combine, "torch"),
        combined(compiled_combine, "torch"), combined(combine, "triton"),
    )  # fmt: skip


def symmetric_operations(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[Operation]:
    """Muon's products of one matrix, and its whole orthogonalisation."""
    from tinytron.kernels.gram_triton import gram, plus_square

    n = 4 * D
    x = torch.randn(D, n, device=device).to(dtype) / n**0.5
    a = x @ x.mT

    def polynomial(a: torch.Tensor) -> torch.Tensor:
        return -2.5 * a + 0.75 * (a @ a)

    fused, fused_whole = (torch.compile(f, dynamic=False) for f in (polynomial, orthogonalize))
    yield Operation(
        "gram", f"x xT, {D} x {n}", D * D * n, x.nbytes + a.nbytes, lambda: x @ x.mT, None, lambda: gram(x)
    )  # fmt: skip
    yield Operation(
        "polynomial", f"b A + c A A, {D} x {D}", D**3, 2 * a.nbytes, lambda: polynomial(a), lambda: fused(a),
        lambda: plus_square(a, -2.5, 0.75),
    )  # fmt: skip
    yield Operation(
        "orthogonalize", f"orthogonalize, {D} x {n}", 5 * (3 * D * D * n + D**3), 2 * x.nbytes, lambda: orthogonalize(x),
        lambda: fused_whole(x), lambda: orthogonalize(x, by="triton"),
    )  # fmt: skip


def operations(device: torch.device, dtype: torch.dtype, tokens: int, D: int, V: int) -> Iterator[Operation]:
    """All of them, for a model of width ``D``."""
    yield from loss_operations(device, dtype, tokens, D, V)
    yield from expert_operations(device, dtype, tokens, D)
    yield from symmetric_operations(device, dtype, D)


def peak_mib(run: Callable[[], object]) -> float:
    """MiB that ``run`` holds at most, beside what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass
class Measured:
    """What one operation took, in milliseconds and MiB; ``compiled`` is ``None`` where no compiled twin is measured."""

    key: str
    name: str
    flops: float
    moved: float
    floor: float
    eager: float
    compiled: float | None
    triton: float
    eager_mib: float
    triton_mib: float

    @property
    def gain(self) -> float:
        """Speed of the kernel over the faster of its twins."""
        return min(self.eager, self.compiled or self.eager) / self.triton

    def row(self) -> str:
        """The line of the table."""
        if self.flops:
            reached = f"{self.flops / self.triton / 1e9:.0f} TFLOP/s"
        else:
            reached = f"{self.moved / self.triton / 1e6:.0f} GB/s"
        compiled = "" if self.compiled is None else f"{self.compiled:.3f}"
        over_compiled = "" if self.compiled is None else f"{self.compiled / self.triton:.2f}"
        return (
            f"| {self.name} | {self.floor:.3f} | {self.eager:.3f} | {compiled} | {self.triton:.3f} | "
            f"{self.floor / self.triton:.0%} | {reached} | {self.eager / self.triton:.2f} | {over_compiled} | "
            f"{self.eager_mib:.0f} | {self.triton_mib:.0f} |"
        )


HEAD = (
    "| operation | floor, ms | eager, ms | compiled, ms | Triton, ms | of the floor | reached | eager / Triton "
    "| compiled / Triton | eager, MiB | Triton, MiB |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def measure(op: Operation, rate: float, bandwidth: float, rounds: int, device: torch.device) -> Measured:
    """Time and memory of all variants of one operation, by turns."""
    variants = [op.eager, op.triton, *([op.compiled] if op.compiled else [])]
    eager, triton, *more = median_ms(variants, rounds, device)
    floor = 1e3 * max(op.flops / rate, op.moved / bandwidth)
    memory = [peak_mib(run) for run in (op.eager, op.triton)]
    return Measured(op.key, op.name, op.flops, op.moved, floor, eager, more[0] if more else None, triton, *memory)


def main() -> None:
    """Print one table per precision and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--width", nargs="+", type=int, default=[768, 2048])
    for name, default in (("tokens", 16384), ("vocab", 50304), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/kernels.py needs a CUDA device: nothing of Triton's speed can be measured on a CPU"
        )
    device = torch.device("cuda")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in training without --disable_tf32
    bandwidth = copy_rate(device)
    for precision in args.precision:
        dtype = DTYPES[precision]
        rate = measured_matmul_rate(device, dtype)
        for D in args.width:
            print(
                f"\n{precision}, width {D}, {torch.cuda.get_device_name()}, torch {torch.__version__}: matrix products "
                f"{rate / 1e12:.0f} TFLOP/s, copies {bandwidth / 1e9:.0f} GB/s\n\n{HEAD}"
            )
            for op in operations(device, dtype, args.tokens, D, args.vocab):
                print(measure(op, rate, bandwidth, args.rounds, device).row(), flush=True)


if __name__ == "__main__":
    main()
