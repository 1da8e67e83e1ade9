"""Data-parallel training of one model by us and by torch's own wrappers, side by side in the same processes.

python benchmarks/zero1.py [--size 10m|50m] [--world 2] [--micro_batch 4] [--rounds 5] [--precision bf16] [--json FILE]

Variants take turns, round by round, so that a noisy machine disturbs all alike; the figure is the median over rounds of
tokens/s relative to torch DDP + AdamW in the same round. All run the same GPT on the same batches with the same loss and
gradient clipping. ``cpu`` is the same ratio of processor seconds (all threads), which other load disturbs less. Bytes are
counted, not estimated: states from the optimizers, traffic as what a rank writes into its sockets in a step. The ring
minimum is that of ours: gradients in fp32 once, parameters once. Plain DDP and the ZeroRedundancyOptimizer move and update
less, because they keep weights, moments and sums of gradients in bf16 alone; "fp32 main weights" is DDP with the precision
of ours. Peak memory is that of a rank running one variant alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tinytron.distributed import DistributedOptimizer, ParallelLayout, ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.model import GPT, ModelConfig
from tinytron.training.build import param_wait_hook
from tinytron.utils.training import DTYPES

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
SEQ_LEN = 512
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Variant:
    """One way to train; ``step`` does one optimizer step on a batch of token ids ``[B, S + 1]``."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype) -> None:
        self.name = name
        self.model: Any = GPT(config, dtype=dtype)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Divided so that a *sum* over ranks is the mean."""
        targets = tokens[:, 1:]
        return self.model(tokens[:, :-1], targets).objective / (targets.numel() * dist.get_world_size())

    def step(self, tokens: torch.Tensor) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """Wait for what the last step left under way."""

    def state_bytes(self) -> int:
        """Optimizer states, and fp32 main weights if there are."""
        raise NotImplementedError


class Ours(Variant):
    """Our wrapper around torch's AdamW."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(name, config, dtype)
        adamw = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.optimizer = DistributedOptimizer(adamw, overlap_param_gather=True, **options)
        state = ParallelState.create(ParallelLayout(dist.get_world_size()), torch.device("cpu"))
        self.optimizer.attach(self.model, specs_of(self.model), state)
        self.model.wait_for_params = param_wait_hook(self.optimizer, self.model)

    def step(self, tokens: torch.Tensor) -> None:
        with self.optimizer.accumulate(last=True):
            self.loss(tokens).backward()
        self.optimizer.step(max_norm=1.0)
        self.optimizer.zero_grad()

    def settle(self) -> None:
        self.optimizer.finish_gather()

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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        inner = getattr(self.optimizer, "optim", self.optimizer)
        return _bytes(inner.state.values())


class MainWeights(Ddp):
    """torch's DDP with what bf16 training needs: AdamW on fp32 copies of the weights, as ours has."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(name, config, dtype, zero=False)
        self.params = list(self.model.parameters())
        self.mains = [torch.nn.Parameter(p.detach().float()) for p in self.params]
        for main in self.mains:
            main.grad = torch.zeros_like(main)
        self.optimizer = torch.optim.AdamW(self.mains, fused=True, **ADAMW)

    def step(self, tokens: torch.Tensor) -> None:
        (self.loss(tokens) * dist.get_world_size()).backward()
        torch._foreach_copy_([main.grad for main in self.mains], [p.grad for p in self.params])
        torch.nn.utils.clip_grad_norm_(self.mains, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.mains)
        self.model.zero_grad()

    def state_bytes(self) -> int:
        return super().state_bytes() + sum(main.nbytes for main in self.mains)


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
        lambda: MainWeights("torch DDP + AdamW, fp32 main weights", config, dtype),
        lambda: Ddp("torch DDP + ZeroRedundancyOptimizer", config, dtype, zero=True),
        lambda: Fsdp("torch FSDP2 fully_shard", config, dtype),
        lambda: Ours("tinytron ZeRO-1", config, dtype, shard=True),
        lambda: Ours("tinytron ZeRO-1, bf16 on the wire", config, dtype, shard=True, reduce_dtype=torch.bfloat16),
        lambda: Ours("tinytron, not sharded", config, dtype, shard=False),
    ]


def sent_bytes() -> int:
    """Bytes this process has written so far; during a step that is what gloo puts into its sockets (Linux only)."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])


def set_up(rank: int, args: argparse.Namespace, rendezvous: str) -> tuple[list[Callable[[], Variant]], torch.Tensor]:
    """The process group, what can be made, and this rank's batch."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.world))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.world)
    sizes = {**SIZES[args.size], "num_key_value_heads": SIZES[args.size]["num_attention_heads"], "block_size": SEQ_LEN}
    config = ModelConfig(**sizes)
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(config.vocab_size, (args.micro_batch, SEQ_LEN + 1), generator=generator)
    return variants(config, DTYPES[args.precision]), tokens


def measure_speed(rank: int, args: argparse.Namespace, rendezvous: str, queue: Any) -> None:
    """One rank of the timed comparison: all variants live side by side and take turns."""
    makers, tokens = set_up(rank, args, rendezvous)
    made = [make() for make in makers]
    rows: list[dict[str, Any]] = []
    for variant in made:
        variant.step(tokens)
        variant.settle()
        dist.barrier()
        before = sent_bytes()
        variant.step(tokens)
        variant.settle()
        dist.barrier()
        wire = sent_bytes() - before
        rows.append({"name": variant.name, "seconds": [], "cpu": [], "wire": wire, "state": variant.state_bytes()})
    for _ in range(args.rounds):
        for variant, row in zip(made, rows, strict=True):
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                variant.step(tokens)
            variant.settle()
            row["cpu"].append((time.process_time() - cpu) / args.steps)
            dist.barrier()
            row["seconds"].append((time.perf_counter() - start) / args.steps)
    if rank == 0:
        queue.put((sum(p.numel() for p in made[0].model.parameters()), rows))
    dist.barrier()
    dist.destroy_process_group()


def measure_memory(rank: int, args: argparse.Namespace, rendezvous: str, queue: Any, index: int) -> None:
    """One rank with a single variant: the growth of its peak resident set from before the model to after two steps."""
    makers, tokens = set_up(rank, args, rendezvous)
    dist.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    variant = makers[index]()
    for _ in range(2):
        variant.step(tokens)
    if rank == 0:
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(job: Callable[..., None], args: argparse.Namespace, *more: Any) -> Any:
    """What rank 0 of ``job`` puts into its queue."""
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawned = mp.spawn(job, (args, f"{folder}/rendezvous", queue, *more), nprocs=args.world, join=False)
        result = queue.get()
        spawned.join()
    return result


def main() -> None:
    """Run, print a table, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences of 512 tokens a rank takes in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a variant in one round")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    count, rows = run_ranks(measure_speed, args)
    for i, row in enumerate(rows):
        row["peak"] = run_ranks(measure_memory, args, i)
    tokens = args.micro_batch * SEQ_LEN * args.world
    width = 2 if args.precision in ("bf16", "fp16") else 4
    minimum = (args.world - 1) / args.world * count * (4 + width)
    print(
        f"\n{count / 1e6:.1f}M parameters, {args.precision}, {args.world} gloo processes, {tokens} tokens a step, torch "
        f"{torch.__version__}, {platform.processor() or platform.machine()}; ring minimum {minimum / 2**20:.1f} MiB\n"
        f"{'variant':<38} {'tok/s':>8} {'vs DDP':>7} {'cpu':>6} {'state B/param':>14} {'peak MiB':>9} {'wire MiB':>9} "
        f"{'vs min':>7}"
    )
    for row in rows:
        row["tokens_per_second"] = tokens / statistics.median(row["seconds"])
        for ratio, kind in (("ratio", "seconds"), ("cpu_ratio", "cpu")):
            row[ratio] = statistics.median(base / own for base, own in zip(rows[0][kind], row[kind], strict=True))
        print(
            f"{row['name']:<38} {row['tokens_per_second']:>8,.0f} {row['ratio']:>7.3f} {row['cpu_ratio']:>6.3f} "
            f"{row['state'] / count:>14.2f} {row['peak'] / 2**20:>9.0f} {row['wire'] / 2**20:>9.1f} "
            f"{row['wire'] / minimum:>7.3f}"
        )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({**settings, "parameters": count, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
