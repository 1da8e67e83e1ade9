"""Data-parallel training of one model by us and by torch's own wrappers, side by side in the same processes.

python benchmarks/zero1.py [--size 10m|50m] [--world 2] [--rounds 5] [--precision bf16] [--json results/zero1.json]

Variants take turns, round by round, so that a noisy machine disturbs all alike; the figure is the median over rounds of
tokens/s relative to torch DDP + AdamW in the same round. All run the same GPT on the same batches with the same loss and
gradient clipping. Bytes are counted, not estimated: states from the optimizers, traffic from the tensors handed to the
collectives, times (P - 1) / P of a ring (all-reduce twice that).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.param_spec import specs_of
from tinytron.model import GPT, ModelConfig
from tinytron.training.config import DTYPES

SIZES: dict[str, dict[str, int]] = {
    "10m": {"num_layer": 6, "hidden_size": 320, "num_attention_heads": 5, "intermediate_size": 896, "vocab_size": 8192},
    "50m": {
        "num_layer": 10,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "intermediate_size": 1536,
        "vocab_size": 16384,
    },
}
SEQ_LEN, MICRO_BATCH, ACCUMULATION = 512, 4, 1
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Variant:
    """One way to train; ``step`` does one optimizer step on a batch of token ids ``[B, S + 1]``."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype) -> None:
        self.name = name
        self.model: Any = GPT(config, dtype=dtype)
        self.targets = MICRO_BATCH * SEQ_LEN * dist.get_world_size()

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Divided so that a *sum* over ranks is the mean."""
        return self.model(tokens[:, :-1], tokens[:, 1:]).objective / self.targets

    def step(self, tokens: torch.Tensor) -> None:
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Optimizer states, and fp32 main weights if there are."""
        raise NotImplementedError


class Ours(Variant):
    """Our wrapper around torch's AdamW."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(name, config, dtype)
        adamw = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.optimizer = DistributedOptimizer(adamw, **options)
        world = dist.group.WORLD
        assert world is not None
        self.optimizer.attach(self.model, specs_of(self.model), {"dense": world, "expert": world, "ep": world})

    def step(self, tokens: torch.Tensor) -> None:
        with self.optimizer.accumulate(last=True):
            self.loss(tokens).backward()
        self.optimizer.step(max_norm=1.0)
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        sizes = self.optimizer.bytes_per_rank()
        return sizes["optimizer"] + sizes["main"]


class Ddp(Variant):
    """torch's data parallelism, with whole or sharded optimizer states."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype, zero: bool) -> None:
        super().__init__(name, config, dtype)
        self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        parameters = self.model.parameters()
        self.optimizer: Any
        if zero:
            self.optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, fused=True, **ADAMW)
        else:
            self.optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)

    def step(self, tokens: torch.Tensor) -> None:
        (self.loss(tokens) * dist.get_world_size()).backward()  # DDP averages
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        inner = getattr(self.optimizer, "optim", self.optimizer)
        return _bytes(inner.state.values())


class Fsdp(Variant):
    """torch's FSDP2, states and gradients sharded, parameters kept after the forward."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(name, config, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(self.model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)

    def step(self, tokens: torch.Tensor) -> None:
        (self.loss(tokens) * dist.get_world_size()).backward()  # FSDP averages
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        main = sum(p.to_local().numel() * 4 for p in self.model.parameters())
        return main + _bytes(self.optimizer.state.values())


def _bytes(states: Any) -> int:
    local = (v.to_local() if hasattr(v, "to_local") else v for s in states for v in s.values() if torch.is_tensor(v))
    return sum(v.numel() * v.element_size() for v in local)


def variants(config: ModelConfig, dtype: torch.dtype) -> list[Callable[[], Variant]]:
    """What is compared; the first is the base."""
    return [
        lambda: Ddp("torch DDP + AdamW", config, dtype, zero=False),
        lambda: Ddp("torch DDP + ZeroRedundancyOptimizer", config, dtype, zero=True),
        lambda: Fsdp("torch FSDP2 fully_shard", config, dtype),
        lambda: Ours("tinytron ZeRO-1", config, dtype, shard=True),
        lambda: Ours("tinytron ZeRO-1, bf16 on the wire", config, dtype, shard=True, reduce_dtype=torch.bfloat16),
        lambda: Ours("tinytron, not sharded", config, dtype, shard=False),
    ]


@contextmanager
def counted_traffic() -> Iterator[dict[str, float]]:
    """Bytes that this rank sends in the collectives of a ring, from the tensors handed to torch.distributed."""
    world = dist.get_world_size()
    ring = (world - 1) / world
    count = {"bytes": 0.0}
    factors = {
        "all_reduce": 2 * ring,
        "all_to_all_single": ring,
        "all_gather_into_tensor": ring,
        "all_gather_single": ring,
    }
    originals = {name: getattr(dist, name) for name in factors if hasattr(dist, name)}

    def wrap(name: str) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            count["bytes"] += args[0].numel() * args[0].element_size() * factors[name]
            return originals[name](*args, **kwargs)

        return counting

    import tinytron.distributed.collectives as ours

    gather = ours._all_gather
    for name in originals:
        setattr(dist, name, wrap(name))
    ours._all_gather = wrap("all_gather_single" if "all_gather_single" in originals else "all_gather_into_tensor")
    try:
        yield count
    finally:
        ours._all_gather = gather
        for name, original in originals.items():
            setattr(dist, name, original)


def measure(rank: int, args: argparse.Namespace, rendezvous: str, queue: Any) -> None:
    """One rank of the benchmark."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.world))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.world)
    sizes = {**SIZES[args.size], "num_key_value_heads": SIZES[args.size]["num_attention_heads"], "block_size": SEQ_LEN}
    config, dtype = ModelConfig(**sizes), DTYPES[args.precision]
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(config.vocab_size, (MICRO_BATCH, SEQ_LEN + 1), generator=generator)
    made = [make() for make in variants(config, dtype)]
    rows: list[dict[str, Any]] = []
    for variant in made:
        variant.step(tokens)
        with counted_traffic() if isinstance(variant, Ours) else nullcontext({"bytes": float("nan")}) as traffic:
            variant.step(tokens)
        rows.append(
            {"name": variant.name, "seconds": [], "wire_bytes": traffic["bytes"], "state": variant.state_bytes()}
        )
    for _ in range(args.rounds):
        for variant, row in zip(made, rows, strict=True):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(args.steps):
                variant.step(tokens)
            dist.barrier()
            row["seconds"].append((time.perf_counter() - start) / args.steps)
    if rank == 0:
        count = sum(p.numel() for p in made[0].model.parameters())
        queue.put((count, rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run, print a table, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a variant in one round")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawned = mp.spawn(measure, (args, f"{folder}/rendezvous", queue), nprocs=args.world, join=False)
        count, rows = queue.get()
        spawned.join()
    tokens = MICRO_BATCH * SEQ_LEN * args.world
    base, width = rows[0]["seconds"], 2 if args.precision in ("bf16", "fp16") else 4
    minimum = (args.world - 1) / args.world * count * (4 + width)
    print(
        f"\n{count / 1e6:.1f}M parameters, {args.precision}, {args.world} gloo processes, {tokens} tokens a step, torch "
        f"{torch.__version__}, {platform.processor() or platform.machine()}; ring minimum {minimum / 2**20:.1f} MiB"
    )
    print(f"{'variant':<38} {'tok/s':>8} {'vs DDP':>7} {'state B/param':>14} {'wire MiB':>9} {'vs min':>7}")
    for row in rows:
        row["tokens_per_second"] = tokens / statistics.median(row["seconds"])
        row["ratio"] = statistics.median(b / s for b, s in zip(base, row["seconds"], strict=True))
        wire = row["wire_bytes"]
        print(
            f"{row['name']:<38} {row['tokens_per_second']:>8,.0f} {row['ratio']:>7.2f} {row['state'] / count:>14.2f} "
            f"{wire / 2**20:>9.1f} {wire / minimum:>7.3f}"
        )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({**settings, "parameters": count, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
