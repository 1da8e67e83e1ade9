"""Experts at balanced and at skewed routing: how much of the dense rate their products reach, and what hides the exchange.

python benchmarks/experts.py [--precision bf16 fp32] [--threads 2] [--tokens 2048] [--rounds 15] [--ranks 2]

Forward and backward of one layer's experts (gate, up and down; no router) on rows that are there already, by us and by one
product after the other, beside a dense layer of the same widths that multiplies as many rows: 100% is as if all experts
were one. With --ranks also a whole layer with shared experts over that many gloo processes of one thread each: its
exchange hidden behind the shared experts, as the model has it, and waited for first. Medians over rounds by turns.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rounds import WARM_UP, median_ms

from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.distributed.expert_parallel.comm import DispatchPlan, combine, dispatch
from tinytron.model import ModelConfig
from tinytron.model.modules.mlp import SwiGLU
from tinytron.model.modules.moe import Experts, MoE
from tinytron.utils.matmul import onednn_keeps_fp32, use_onednn
from tinytron.utils.training import DTYPES

D, F, E, K = 256, 384, 8, 2  # the experts of the 20M model of step_time.py
GPU_SIZES = 2048, 1024, 64, 8  # D, F, E, K on a GPU


class Looped(Experts):
    """One product per expert, as models without a grouped one have it."""

    def forward(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, counts: list[int]) -> torch.Tensor:
        parts = []
        for rows, gate_up, down in zip(rows_QD.split(counts), self.gate_up_proj, self.down_proj, strict=True):
            gate, up = (rows @ gate_up.t()).chunk(2, dim=-1)
            parts.append((torch.nn.functional.silu(gate) * up) @ down.t())
        return torch.cat(parts)


class Waiting(MoE):
    """The shared expert after the exchange instead of during it."""

    def _mixture(self, x_BsD: torch.Tensor, weight_Tk: torch.Tensor, routes: DispatchPlan) -> torch.Tensor:
        rows_QD = self.experts(dispatch(x_BsD.flatten(0, 1), routes, self.group).wait(), routes.rows_e, routes.counts)
        rows_RD = combine(rows_QD, routes, self.group)
        return self._sum(rows_RD, weight_Tk, routes.order_R, routes.inverse_R, self._shared_output(x_BsD)).view_as(
            x_BsD
        )


def loads(rows: int, experts: int, count: int) -> dict[str, list[list[int]]]:
    """Rows of each expert, ``count`` times, never quite the same, as it is in training: nearly alike; some more, as routers
    do; by Zipf's law; and half of all to one."""
    generator = torch.Generator().manual_seed(0)
    half = torch.full((experts,), 0.5 / max(1, experts - 1))
    half[0] = 0.5
    weights = {
        "balanced": torch.ones(experts),
        "uneven": 0.5 + torch.rand(experts, generator=generator),
        "Zipf": 1 / torch.arange(1, experts + 1),
        "half to one": half,
    }

    def shares(weight: torch.Tensor) -> list[int]:
        chosen = torch.multinomial(weight, rows, replacement=True, generator=generator)
        return [int(n) for n in torch.bincount(chosen, minlength=experts)]

    return {name: [shares(weight) for _ in range(count)] for name, weight in weights.items()}


def backward_too(module: torch.nn.Module, x: torch.Tensor, args: Iterable[tuple[Any, ...]]) -> Callable[[], object]:
    """Forward and backward, all gradients; each call with the next of ``args``."""
    x = x.detach().requires_grad_()
    grad, inputs, following = torch.randn_like(x), [x, *module.parameters()], iter(args)
    return lambda: torch.autograd.grad(module(x, *next(following)), inputs, grad)


def products(precision: str, tokens: int, rounds: int, device: torch.device) -> None:
    """The first table."""
    sizes = (D, F, E, K) if device.type == "cpu" else GPU_SIZES
    width, inner, experts, top_k = sizes
    rows, dtype = tokens * top_k, DTYPES[precision]
    made: list[Experts] = [kind(experts, width, inner).to(device, dtype) for kind in (Experts, Looped)]
    dense = SwiGLU(width, inner, False).to(device, dtype)
    for parameter in [p for module in (*made, dense) for p in module.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(rows, width, device=device).to(dtype)
    print(
        f"\n{precision}: {rows:,} rows of {width}, {experts} experts of {inner}\n\n"
        "| routing | rows of an expert | dense, ms | GFLOP/s | ours, ms | GFLOP/s | of the dense | a loop, ms | ratio |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, counts in loads(rows, experts, rounds + WARM_UP).items():
        arguments = [(torch.tensor(these, device=device), these) for these in counts]
        runs = [backward_too(dense, x, [()] * len(counts)), *(backward_too(module, x, arguments) for module in made)]
        whole, ours, loop = median_ms(runs, rounds, device)
        flops = 18 * rows * width * inner / 1e6
        print(
            f"| {name} | {min(map(min, counts)):,}-{max(map(max, counts)):,} | {whole:.2f} | {flops / whole:.0f} | "
            f"{ours:.2f} | {flops / ours:.0f} | {whole / ours:.0%} | {loop:.2f} | {loop / ours:.2f} |"
        )


def exchange(rank: int, ranks: int, precision: str, tokens: int, rounds: int, port: int) -> None:
    """The second table: one rank of a layer over ``ranks`` processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    state = ParallelState.create(ParallelLayout(ranks, 1, ranks), torch.device("cpu"))
    rows = []
    for shared in (1, 2, 4):
        config = ModelConfig(
            hidden_size=D, use_moe=True, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=F,
            num_shared_experts=shared,
        )  # fmt: skip
        layers = [kind(config, state).to(DTYPES[precision]) for kind in (MoE, Waiting)]
        for parameter in [p for layer in layers for p in layer.parameters()]:
            torch.nn.init.normal_(parameter, std=0.05)
        x = torch.randn(1, tokens, D).to(DTYPES[precision]).requires_grad_()
        grad = torch.randn_like(x)

        def run(layer: MoE, x: torch.Tensor = x, grad: torch.Tensor = grad) -> object:
            out, _ = layer(x, layer.router(x.flatten(0, 1)))
            return torch.autograd.grad(out, [x, *layer.parameters()], grad)

        hidden, waiting = median_ms([partial(run, layer) for layer in layers], rounds, x.device)
        rows.append(f"| {shared} | {waiting:.2f} | {hidden:.2f} | {waiting / hidden:.3f} |")
    if rank == 0:
        print(
            f"\n{precision}, {ranks} ranks of one thread, {tokens} tokens each\n\n"
            "| shared experts | exchange first, ms | hidden, ms | ratio |\n|---:|---:|---:|---:|"
        )
        print("\n".join(rows), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    for name, default in (("threads", torch.get_num_threads()), ("tokens", 2048), ("rounds", 15), ("ranks", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if device.type == "cpu" and onednn_keeps_fp32():
        use_onednn()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {args.threads} threads, torch {torch.__version__}")
    for precision in args.precision:
        products(precision, args.tokens, args.rounds, device)
    for number, precision in enumerate(args.precision if args.ranks > 1 else []):
        mp.spawn(exchange, (args.ranks, precision, args.tokens, args.rounds, 29700 + number), nprocs=args.ranks)


if __name__ == "__main__":
    main()
